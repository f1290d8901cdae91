// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/bn_stats.cuh"
#include "launch/reduce.h"

namespace resnet_fast {
namespace {

template <class T>
ReducePlan plan(const BatchNormActParams& p) {
  return plan_reduce(
      p.shape, aligned(p.x) ? kVector<T> : 1,
      [](int vector) { return vector == 1 ? BnStats<T, 1>::kU : BnStats<T, kVector<T>>::kU; },
      kBnStatsBlocksPerSm);
}

template <class T, int V>
BnStats<T, V> make_op(const BatchNormActParams& p, const ReducePlan& plan) {
  using A = Accumulator<T>;
  BnStats<T, V> op;
  op.x = static_cast<const T*>(p.x);
  op.channel_stride = p.shape.layout == Layout::kChannelsLast ? 1 : p.shape.inner;
  op.partials = {static_cast<A*>(p.scratch), p.shape.c, static_cast<int>(plan.splits)};
  op.mean = static_cast<A*>(p.mean);
  op.invstd = static_cast<A*>(p.invstd);
  op.running_mean = static_cast<A*>(p.running_mean);
  op.running_var = static_cast<A*>(p.running_var);
  op.momentum = static_cast<A>(p.momentum);
  op.eps = static_cast<A>(p.eps);
  return op;
}

}  // namespace

std::size_t batch_norm_act_scratch_bytes(const BatchNormActParams& p) {
  if (!p.training || elements_of(p.shape) == 0) return 0;
  std::size_t bytes = 0;
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bytes = Partials<Accumulator<T>>::size(p.shape.c, plan<T>(p).splits) * sizeof(Accumulator<T>);
    return Status{};
  });
  return bytes;
}

Status launch_bn_stats(const BatchNormActParams& p, Stream stream) {
  if (elements_of(p.shape) == 0) return {1, "batch statistics of an empty tensor"};
  poison(p.mean, p.shape.c * accumulator_size(p.dtype));
  poison(p.invstd, p.shape.c * accumulator_size(p.dtype));
  poison(p.scratch, batch_norm_act_scratch_bytes(p));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ReducePlan reduce = plan<T>(p);
    return with_vector<T>(reduce.vector > 1, [&](auto width) {
      return launch_reduce("bn_stats", "bn_stats_merge",
                           make_op<T, decltype(width)::value>(p, reduce), reduce, stream);
    });
  });
}

}  // namespace resnet_fast
