// SPDX-License-Identifier: BSD-3-Clause
// y = relu(x + residual), with a 1-bit mask, and the gradient through that mask.
//
// Bytes moved for numel elements of b bytes: forward 3 b numel + numel / 8, backward 2 b numel +
// numel / 8: each tensor once. Any dense layout: the order of elements does not matter.
#include "loops.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

struct NoCoefficients {};

template <class T>
struct AddRelu {
  const T* x;
  const T* residual;
  T* y;
  uint16_t* mask;
  bool streamed;

  RF_INLINE void whole(int64_t i, const NoCoefficients&) const {
    // The sum as the dtype holds it: the mask is of the value that is stored.
    const auto r = rounded<T>(load(x + i) + load(residual + i));
    put(y + i, relu(r), streamed);
    if (mask) mask[i / kLanes] = above(r, Accumulate<T>(0));
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const NoCoefficients&) const {
    const auto r = rounded<T>(load_part(x + i, lo, hi) + load_part(residual + i, lo, hi));
    store_part(y + i, relu(r), lo, hi);
    if (mask) store_mask_part(mask + i / kLanes, above(r, Accumulate<T>(0)), lo, hi);
  }
};

template <class T>
struct MaskedGrad {
  const T* grad;
  const uint16_t* mask;
  T* dx;
  bool streamed;

  RF_INLINE void whole(int64_t i, const NoCoefficients&) const {
    put(dx + i, select(mask[i / kLanes], load(grad + i)), streamed);
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const NoCoefficients&) const {
    store_part(dx + i, select(mask[i / kLanes], load_part(grad + i, lo, hi)), lo, hi);
  }
};

template <class Body>
void run(int64_t numel, const Parallel& parallel, const Body& body) {
  // Threads get whole packs: ranges of the tensor that begin at a multiple of sixteen.
  parallel_for(parallel, ceil_div(numel, kLanes), kGrain / kLanes, [&](int64_t begin, int64_t end) {
    walk_run(begin * kLanes, minimum(end * kLanes, numel), NoCoefficients{}, body);
    finish_streaming();
  });
}

}  // namespace

void add_relu(const AddReluParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run(p.numel, parallel,
        AddRelu<T>{static_cast<const T*>(p.x), static_cast<const T*>(p.residual),
                   static_cast<T*>(p.y), p.mask, p.stream});
  });
}

void masked_grad(const MaskedGradParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run(p.numel, parallel,
        MaskedGrad<T>{static_cast<const T*>(p.grad), p.mask, static_cast<T*>(p.dx), p.stream});
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
