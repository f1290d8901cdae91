// SPDX-License-Identifier: BSD-3-Clause
// y = (x - mean) * scale + bias [+ residual] [relu] [mask]: one pass, each tensor once.
//
// NOTE: x - mean first, not x * scale + (bias - mean * scale): for a channel of mean 1e4 and
// standard deviation 1e-2 the latter cancels all its digits.
#include "loops.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

template <class T>
struct Apply {
  using A = Accumulate<T>;
  const T* x;
  const T* residual;
  T* y;
  uint16_t* mask;
  bool with_relu;
  bool streamed;

  RF_INLINE Pack<A> compute(const Pack<A>& v, const Pack<A> (&c)[3]) const {
    return fma(v - c[0], c[1], c[2]);
  }
  RF_INLINE void whole(int64_t i, const Pack<A> (&c)[3]) const {
    Pack<A> v = compute(load(x + i), c);
    if (residual) v = v + load(residual + i);
    if (mask) mask[i / kLanes] = above(v, kRoundsToZero<T>);
    if (with_relu) v = relu(v);
    put(y + i, v, streamed);
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A> (&c)[3]) const {
    Pack<A> v = compute(load_part(x + i, lo, hi), c);
    if (residual) v = v + load_part(residual + i, lo, hi);
    if (mask) store_mask_part(mask + i / kLanes, above(v, kRoundsToZero<T>), lo, hi);
    if (with_relu) v = relu(v);
    store_part(y + i, v, lo, hi);
  }
  RF_INLINE void finish() const { finish_streaming(); }
};

}  // namespace

void bn_apply(const BnApplyParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A* const coefficients[3] = {static_cast<const A*>(p.mean), static_cast<const A*>(p.scale),
                                      static_cast<const A*>(p.bias)};
    walk(p.geometry, coefficients, parallel,
         Apply<T>{static_cast<const T*>(p.x), static_cast<const T*>(p.residual),
                  static_cast<T*>(p.y), p.mask, p.relu, p.stream});
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
