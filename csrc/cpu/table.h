// SPDX-License-Identifier: BSD-3-Clause
// The kernels of one instruction set, by name, and the switch over dtypes that begins each of them.
#pragma once

#include "load_store.h"
#include "params.h"

namespace resnet_fast::cpu::RF_ISA {

void add_relu(const AddReluParams&, const Parallel&);
void masked_grad(const MaskedGradParams&, const Parallel&);
void scaled_add_relu(const ScaledAddReluParams&, const Parallel&);
void scaled_add_relu_grad(const ScaledAddReluGradParams&, const Parallel&);
void bn_stats(const BnStatsParams&, const Parallel&);
void bn_apply(const BnApplyParams&, const Parallel&);
void bn_reduce(const BnReduceParams&, const Parallel&);
void bn_grad(const BnGradParams&, const Parallel&);
void max_pool(const MaxPoolParams&, const Parallel&);
void max_pool_grad(const MaxPoolGradParams&, const Parallel&);
void conv_winograd(const ConvParams&, int tile, const Parallel&);
void conv_winograd_pack(const FilterParams&, int tile, const Parallel&);
void conv_winograd_weight(const ConvParams&, float* weight, int tile, const Parallel&);
void conv_direct(const ConvParams&, const Parallel&);
void conv_stem(const ConvParams&, bool max_pool, const Parallel&);

// Calls body with a value of the dtype's type.
template <class Body>
RF_INLINE void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(Half{});
    case DType::kBFloat16:
      return body(BFloat16{});
  }
}

}  // namespace resnet_fast::cpu::RF_ISA
