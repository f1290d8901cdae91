// SPDX-License-Identifier: BSD-3-Clause
// How an element-wise pass is laid out over the grid. Pure arithmetic.
#pragma once

#include <numeric>

#include "kernels/sweep.cuh"
#include "launch/common.h"

namespace resnet_fast {

struct SweepPlan {
  SweepShape shape;
  bool channels_last = false;
  int vector = 1;
  int64_t blocks = 1;
};

inline SweepPlan plan_sweep(const Shape& shape, int vector, int blocks_per_sm) {
  SweepPlan plan;
  plan.channels_last = shape.layout == Layout::kChannelsLast || shape.inner == 1;
  plan.vector = vector;
  plan.shape.elements = elements_of(shape);
  plan.shape.channels = shape.c;
  plan.shape.inner = shape.inner;
  const int64_t per_block = int64_t{kThreads} * vector;
  const int64_t wave = int64_t{multiprocessors()} * blocks_per_sm;
  const int64_t needed = std::max<int64_t>(1, ceil_div(plan.shape.elements, per_block));
  plan.blocks = std::min(needed, wave);
  if (plan.channels_last && needed > wave) {
    // More than one sweep: the grid's width must be a multiple of C.
    const int64_t period = shape.c / std::gcd(shape.c, per_block);
    plan.blocks = std::min(needed, std::max(period, wave / period * period));
  }
  const int64_t largest = std::max(plan.shape.elements, plan.blocks * per_block);
  // 1: an empty tensor has no element to find the channel of.
  plan.shape.by_inner = Divider(std::max<int64_t>(1, shape.inner), largest);
  plan.shape.by_channels = Divider(shape.c, largest);
  return plan;
}

// Calls function(V, channels_last), both as integral constants.
template <class T, class Function>
Status with_sweep(const SweepPlan& plan, const Function& function) {
  return with_vector<T>(plan.vector > 1, [&](auto width) {
    return plan.channels_last ? function(width, std::true_type{})
                              : function(width, std::false_type{});
  });
}

}  // namespace resnet_fast
