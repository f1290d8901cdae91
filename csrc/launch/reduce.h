// SPDX-License-Identifier: BSD-3-Clause
// How a channel reduction is laid out over the grid, and its launch. Pure arithmetic.
#pragma once

#include <numeric>

#include "kernels/reduce.cuh"
#include "launch/common.h"

namespace resnet_fast {

struct ReducePlan {
  ReduceShape shape;
  int vector = 1;
  int64_t blocks_x = 1;
  int64_t splits = 1;
};

// (N, C, inner) with the cases that coincide in memory brought together: a matrix is channels_last,
// a single channel is one plane.
inline Shape simplified(Shape shape) {
  if (shape.inner == 1 && shape.c > 1) shape.layout = Layout::kChannelsLast;
  if (shape.c == 1) return {1, 1, shape.n * shape.inner, Layout::kContiguous};
  return shape;
}

// Rows per thread and tile, tiles and splits. Every multiprocessor gets a block, though a thread
// may then have less than a full tile. More blocks run, up to one wave, as long as a thread still
// has two full tiles: each further split costs partial results to write and merge.
inline void plan_splits(ReducePlan* plan, int unroll, int blocks_per_sm) {
  ReduceShape& s = plan->shape;
  const int64_t sms = multiprocessors();
  const int64_t least = ceil_div(sms, plan->blocks_x);
  const int64_t most = std::max(least, sms * blocks_per_sm / plan->blocks_x);
  const int64_t full_tiles = ceil_div(s.rows, int64_t{s.threads_y} * unroll);
  const int64_t wanted = std::clamp(full_tiles / 2, least, most);
  const int64_t rows_per_thread = ceil_div(s.rows, s.threads_y * wanted);
  s.unroll = static_cast<int>(std::clamp<int64_t>(rows_per_thread, 1, unroll));
  s.tiles = ceil_div(s.rows, int64_t{s.threads_y} * s.unroll);
  const int64_t rounds = std::max<int64_t>(1, ceil_div(s.tiles, wanted));
  plan->splits = std::clamp<int64_t>(ceil_div(s.tiles, rounds), 1, 65535);
}

inline void plan_columns(ReducePlan* plan, int vector, int64_t rows, int64_t columns, int64_t inner,
                         int threads_x) {
  ReduceShape& s = plan->shape;
  plan->vector = vector;
  s.rows = rows;
  s.columns = columns;
  s.inner = inner;
  s.threads_x = threads_x;
  s.threads_y = kThreads / threads_x;
  plan->blocks_x = ceil_div(columns, int64_t{threads_x} * vector);
}

inline void plan_planes(ReducePlan* plan, int vector, const Shape& shape) {
  ReduceShape& s = plan->shape;
  plan->vector = vector;
  s.planes = true;
  s.inner = shape.inner;
  s.rows = shape.n * (shape.inner / vector);
  s.threads_y = kThreads;
  s.plane_vectors = Divider(shape.inner / vector, s.rows);
  plan->blocks_x = shape.c;
}

// full_vector: elements of a 16-byte access, 1 if a tensor is not aligned for it. unroll(V) is the
// kernel's kU. blocks_per_sm as in its launch bounds.
template <class Unroll>
ReducePlan plan_reduce(Shape shape, int full_vector, const Unroll& unroll, int blocks_per_sm) {
  ReducePlan plan;
  shape = simplified(shape);
  plan.shape.channels = shape.c;
  const int64_t v = full_vector;
  if (shape.layout == Layout::kChannelsLast) {
    const int vector = shape.c % v == 0 ? full_vector : 1;
    int threads_x = 1;
    while (threads_x < 32 && int64_t{threads_x} * vector < shape.c) threads_x *= 2;
    plan_columns(&plan, vector, shape.n * shape.inner, shape.c, 1, threads_x);
  } else {
    // Vectors after which a plane's end and a vector's end coincide; short planes that end in the
    // middle of a 32-byte sector are read side by side, too.
    const int64_t period = shape.inner / std::gcd(shape.inner, v);
    const bool whole_sectors = shape.inner % (2 * v) == 0 || shape.inner / v > kThreads / 2;
    if (shape.inner % v == 0 && whole_sectors) {
      plan_planes(&plan, full_vector, shape);
    } else if (v > 1 && shape.c * shape.inner % v == 0 && period <= kThreads / 2) {
      const auto threads_x = static_cast<int>(period * (kThreads / 2 / period));
      plan_columns(&plan, full_vector, shape.n, shape.c * shape.inner, shape.inner, threads_x);
    } else if (shape.inner % v == 0) {
      plan_planes(&plan, full_vector, shape);
    } else {
      plan_planes(&plan, 1, shape);
    }
  }
  plan_splits(&plan, unroll(plan.vector), blocks_per_sm);
  return plan;
}

// The reduction and, if several blocks share a channel, the merge of their partial results.
template <class Op>
Status launch_reduce(const char* name, const char* merge_name, const Op& op, const ReducePlan& plan,
                     Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.splits));
  const Status status =
      launch(name, channel_reduce_kernel<Op>, grid, kThreads, 0, stream, op, plan.shape);
  if (!status.ok() || plan.splits == 1) return status;
  const auto blocks = static_cast<unsigned>(ceil_div(plan.shape.channels, kMergeChannels));
  return launch(merge_name, merge_partials_kernel<Op>, blocks, kThreads, 0, stream, op);
}

}  // namespace resnet_fast
