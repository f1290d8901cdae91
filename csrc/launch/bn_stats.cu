// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/bn_stats.cuh"
#include "launch/forward.h"
#include "launch/reduce.h"

namespace resnet_fast {
namespace {

template <class T>
ReducePlan plan(const Shape& shape, const void* x) {
  return plan_reduce(
      shape, aligned(x) ? kVector<T> : 1,
      [](int vector) { return vector == 1 ? BnStats<T, 1>::kU : BnStats<T, kVector<T>>::kU; },
      kBnStatsBlocksPerSm);
}

template <class T, int V>
BnStats<T, V> make_op(const BatchNormActParams& p) {
  return stats_of<T, V>(p);
}

template <class T, int V>
BnStats<T, V> make_op(const BatchNormStatisticsParams& p) {
  BatchNormActParams whole;
  whole.shape = p.shape;
  whole.x = p.x;
  BnStats<T, V> op = stats_of<T, V>(whole);
  op.wide_mean = p.mean;
  op.wide_m2 = p.m2;
  return op;
}

template <class Params>
Status launch_stats(const Params& p, Stream stream) {
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ReducePlan reduce = plan<T>(p.shape, p.x);
    return with_vector<T>(reduce.vector > 1, [&](auto width) {
      auto op = make_op<T, decltype(width)::value>(p);
      op.partials = {static_cast<Accumulator<T>*>(p.scratch), p.shape.c,
                     static_cast<int>(reduce.splits)};
      return launch_reduce("bn_stats", "bn_stats_merge", op, reduce, stream);
    });
  });
}

template <class Params>
std::size_t scratch_bytes(const Params& p) {
  std::size_t bytes = 0;
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    bytes = Partials<A>::size(p.shape.c, plan<T>(p.shape, p.x).splits) * sizeof(A);
    return Status{};
  });
  return bytes;
}

}  // namespace

std::size_t batch_norm_act_scratch_bytes(const BatchNormActParams& p) {
  return p.training && elements_of(p.shape) > 0 ? scratch_bytes(p) : 0;
}

std::size_t batch_norm_statistics_scratch_bytes(const BatchNormStatisticsParams& p) {
  return scratch_bytes(p);
}

Status launch_bn_stats(const BatchNormActParams& p, Stream stream) {
  if (elements_of(p.shape) == 0) return {1, "batch statistics of an empty tensor"};
  poison(p.mean, p.shape.c * accumulator_size(p.dtype));
  poison(p.invstd, p.shape.c * accumulator_size(p.dtype));
  poison(p.scratch, batch_norm_act_scratch_bytes(p));
  return launch_stats(p, stream);
}

Status launch_batch_norm_statistics(const BatchNormStatisticsParams& p, Stream stream) {
  if (elements_of(p.shape) == 0) return {1, "statistics of an empty tensor"};
  poison(p.mean, p.shape.c * sizeof(double));
  poison(p.m2, p.shape.c * sizeof(double));
  poison(p.scratch, batch_norm_statistics_scratch_bytes(p));
  return launch_stats(p, stream);
}

}  // namespace resnet_fast
