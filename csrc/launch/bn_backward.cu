// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/bn_backward.cuh"
#include "launch/reduce.h"
#include "launch/sweep.h"

namespace resnet_fast {
namespace {

using Params = BatchNormActBackwardParams;

bool needs_sums(const Params& p) { return p.dweight || p.dbias || (p.training && p.dx); }

template <class T>
ReducePlan plan_sums(const Params& p) {
  const bool full = aligned(p.grad, p.x, p.dresidual, p.training ? nullptr : p.dx);
  return plan_reduce(
      p.shape, full ? kVector<T> : 1,
      [](int vector) { return vector == 1 ? BnGrad<T, 1>::kU : BnGrad<T, kVector<T>>::kU; },
      kBnGradBlocksPerSm);
}

template <class T>
BnGradInput<T> input(const BatchNormGradInput& p) {
  using A = Accumulator<T>;
  BnGradInput<T> in;
  in.grad = static_cast<const T*>(p.grad);
  in.x = static_cast<const T*>(p.x);
  in.mask = p.mask;
  in.mean = static_cast<const A*>(p.mean);
  in.invstd = static_cast<const A*>(p.invstd);
  in.weight = static_cast<const A*>(p.weight);
  in.bias = static_cast<const A*>(p.bias);
  in.mask_from = !p.relu ? MaskFrom::kNothing : p.mask ? MaskFrom::kBits : MaskFrom::kInput;
  return in;
}

// wide_sum, wide_dot: not null: where the sums go, in place of those of p.
template <class T>
Status launch_sums(const Params& p, Stream stream, double* wide_sum = nullptr,
                   double* wide_dot = nullptr) {
  const ReducePlan plan = plan_sums<T>(p);
  return with_vector<T>(plan.vector > 1, [&](auto width) {
    using Op = BnGrad<T, decltype(width)::value>;
    using A = typename Op::A;
    Op op;
    op.in = input<T>(p);
    op.dresidual = static_cast<T*>(p.dresidual);
    op.dx = static_cast<T*>(p.training ? nullptr : p.dx);
    op.sums = static_cast<A*>(p.scratch);
    op.partials = {op.sums + 2 * p.shape.c, p.shape.c, static_cast<int>(plan.splits)};
    op.dweight = static_cast<A*>(p.dweight);
    op.dbias = static_cast<A*>(p.dbias);
    op.wide_sum = wide_sum;
    op.wide_dot = wide_dot;
    return launch_reduce("bn_grad", "bn_grad_merge", op, plan, stream);
  });
}

template <class T>
Status launch_sweep(BnGradApply<T> op, const Shape& shape, Stream stream) {
  const bool full = aligned(op.in.grad, op.in.x, op.dx, op.dresidual);
  const SweepPlan plan = plan_sweep(shape, full ? kVector<T> : 1, kBnGradApplyBlocksPerSm);
  op.shape = plan.shape;
  return with_sweep<T>(plan, [&](auto width, auto channels_last) {
    return launch("bn_grad_apply",
                  bn_grad_apply_kernel<T, decltype(width)::value, decltype(channels_last)::value>,
                  static_cast<unsigned>(plan.blocks), kThreads, 0, stream, op);
  });
}

template <class T>
Status launch_apply(const Params& p, Stream stream) {
  using A = Accumulator<T>;
  BnGradApply<T> op;
  op.in = input<T>(p);
  op.dx = static_cast<T*>(p.dx);
  op.dresidual = static_cast<T*>(p.dresidual);
  op.sum = op.dot = nullptr;
  if (p.training && needs_sums(p)) {
    op.sum = static_cast<const A*>(p.scratch);
    op.dot = op.sum + p.shape.c;
    op.dresidual = nullptr;  // written by the reduction; it is the masked gradient
    if (p.dresidual) {
      op.in.grad = static_cast<const T*>(p.dresidual);
      op.in.mask_from = MaskFrom::kNothing;
    }
  }
  op.count = static_cast<A>(p.shape.n * p.shape.inner);
  return launch_sweep(op, p.shape, stream);
}

// Of the sums' two arrays and the partial results.
std::size_t scratch_bytes(const Params& p) {
  std::size_t bytes = 0;
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const int64_t partials = Partials<A>::size(p.shape.c, plan_sums<T>(p).splits);
    bytes = (2 * p.shape.c + partials) * sizeof(A);
    return Status{};
  });
  return bytes;
}

// The first phase as the part of the whole that it is: the reduction, with the masked gradient
// where the residual's stands.
Params as_whole(const BatchNormActBackwardReduceParams& p) {
  Params whole;
  static_cast<BatchNormGradInput&>(whole) = p;
  whole.dresidual = p.masked;
  whole.scratch = p.scratch;
  whole.training = true;
  return whole;
}

}  // namespace

std::size_t batch_norm_act_backward_scratch_bytes(const Params& p) {
  return needs_sums(p) && elements_of(p.shape) > 0 ? scratch_bytes(p) : 0;
}

Status launch_batch_norm_act_backward(const Params& p, Stream stream) {
  const int64_t elements = elements_of(p.shape);
  if (elements == 0) return {};
  if (p.dx != p.grad) poison(p.dx, elements * size_of(p.dtype));
  poison(p.dresidual, elements * size_of(p.dtype));
  poison(p.dweight, p.shape.c * accumulator_size(p.dtype));
  poison(p.dbias, p.shape.c * accumulator_size(p.dtype));
  poison(p.scratch, batch_norm_act_backward_scratch_bytes(p));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!needs_sums(p)) return p.dx || p.dresidual ? launch_apply<T>(p, stream) : Status{};
    const Status status = launch_sums<T>(p, stream);
    return status.ok() && p.training && p.dx ? launch_apply<T>(p, stream) : status;
  });
}

std::size_t batch_norm_act_backward_reduce_scratch_bytes(
    const BatchNormActBackwardReduceParams& p) {
  return scratch_bytes(as_whole(p));
}

Status launch_batch_norm_act_backward_reduce(const BatchNormActBackwardReduceParams& p,
                                             Stream stream) {
  if (elements_of(p.shape) == 0) return {1, "sums of an empty tensor"};
  const Params whole = as_whole(p);
  poison(p.masked, elements_of(p.shape) * size_of(p.dtype));
  poison(p.sum, p.shape.c * sizeof(double));
  poison(p.dot, p.shape.c * sizeof(double));
  poison(p.scratch, scratch_bytes(whole));
  return with_dtype(p.dtype, [&](auto tag) {
    return launch_sums<typename decltype(tag)::type>(whole, stream, p.sum, p.dot);
  });
}

Status launch_batch_norm_act_backward_apply(const BatchNormActBackwardApplyParams& p,
                                            Stream stream) {
  if (elements_of(p.shape) == 0) return {};
  if (p.dx != p.grad) poison(p.dx, elements_of(p.shape) * size_of(p.dtype));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    BnGradApply<T> op = {};
    op.in = input<T>(p);
    op.in.mask_from = MaskFrom::kNothing;
    op.dx = static_cast<T*>(p.dx);
    op.sum = static_cast<const A*>(p.sum);
    op.dot = static_cast<const A*>(p.dot);
    op.count = static_cast<A>(p.count);
    return launch_sweep(op, p.shape, stream);
  });
}

}  // namespace resnet_fast
