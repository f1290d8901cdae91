// SPDX-License-Identifier: BSD-3-Clause
// The forward's parameters as its kernels take them, in every launcher alike.
#pragma once

#include "kernels/bn_apply.cuh"
#include "kernels/bn_stats.cuh"
#include "launch/params.h"

namespace resnet_fast {

// Without what the reduction over several blocks needs.
template <class T, int V>
BnStats<T, V> stats_of(const BatchNormActParams& p) {
  using A = Accumulator<T>;
  BnStats<T, V> op = {};
  op.x = static_cast<const T*>(p.x);
  op.channel_stride = p.shape.layout == Layout::kChannelsLast ? 1 : p.shape.inner;
  op.mean = static_cast<A*>(p.mean);
  op.invstd = static_cast<A*>(p.invstd);
  op.running_mean = static_cast<A*>(p.running_mean);
  op.running_var = static_cast<A*>(p.running_var);
  op.momentum = static_cast<A>(p.momentum);
  op.eps = static_cast<A>(p.eps);
  return op;
}

// Without the shape of its sweep.
template <class T>
BnApply<T> apply_of(const BatchNormActParams& p) {
  using A = Accumulator<T>;
  BnApply<T> op = {};
  op.x = static_cast<const T*>(p.x);
  op.residual = static_cast<const T*>(p.residual);
  op.y = static_cast<T*>(p.y);
  op.mask = p.mask;
  op.mean = static_cast<const A*>(p.training ? p.mean : p.running_mean);
  op.invstd = static_cast<const A*>(p.invstd);
  op.var = static_cast<const A*>(p.training ? nullptr : p.running_var);
  op.weight = static_cast<const A*>(p.weight);
  op.bias = static_cast<const A*>(p.bias);
  op.mean_out = static_cast<A*>(p.mean);
  op.invstd_out = static_cast<A*>(p.invstd);
  op.eps = static_cast<A>(p.eps);
  op.relu = p.relu;
  return op;
}

}  // namespace resnet_fast
