// SPDX-License-Identifier: BSD-3-Clause
// When a whole forward is one launch, and how that is laid out. Pure arithmetic.
#pragma once

#include "kernels/bn_fused.cuh"
#include "launch/common.h"

namespace resnet_fast {

struct FusedPlan {
  int64_t blocks = 0;  // 0: the shape is not one for it
  int64_t rows = 0;
  std::size_t slab_bytes = 0;
};

// For tensors aligned to 16 bytes, and no mask.
template <class T>
FusedPlan plan_fused(const Shape& shape) {
  const bool channels_last = shape.layout == Layout::kChannelsLast || shape.inner == 1;
  const int64_t rows = shape.n * shape.inner;
  const int64_t slab = rows * kBnFusedChannels<T> * static_cast<int64_t>(sizeof(T));
  if (!channels_last || shape.c % kBnFusedChannels<T> != 0 || rows == 0 ||
      slab > static_cast<int64_t>(kMaxDynamicShared))
    return {};
  return {shape.c / kBnFusedChannels<T>, rows, static_cast<std::size_t>(slab)};
}

// Whether launch_batch_norm_act takes bn_fused for these parameters.
bool runs_fused(const BatchNormActParams& params);
Status launch_bn_fused(const BatchNormActParams& params, Stream stream);

}  // namespace resnet_fast
