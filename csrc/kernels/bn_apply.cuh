// SPDX-License-Identifier: BSD-3-Clause
// Batch-norm apply: y = (x - mean) * (invstd * weight) + bias [+ residual] [ReLU] [1-bit mask],
// with the batch's statistics or, in evaluation, straight from the running ones, which makes the
// whole forward a single pass.
//
// Layouts: channels_last and NCHW, see sweep.cuh.
// dtypes:  float64, float32, float16, bfloat16; arithmetic in float32 (float64), rounded once.
// Bytes moved, E elements of b bytes, C channels, parameters of a bytes:
//          2bE (+ bE with residual) (+ E/8 with mask) + 4aC (+ 2aC in evaluation).
//          The parameters are read again by every thread (channels_last) or vector (NCHW), from L1.
// Shape:   4 vectors per operand and thread in flight, 2 blocks per multiprocessor: 64 KB of x and
//          residual. One wave of blocks that stays, so that coefficients are fetched once.
#pragma once

#include "kernels/sweep.cuh"

namespace resnet_fast {

constexpr int kBnApplyBlocksPerSm = 2;
constexpr int kBnApplyUnroll = 4;

template <class T>
struct BnApply {
  using A = Accumulator<T>;
  SweepShape shape;
  const T *x, *residual;
  T* y;
  uint8_t* mask;
  const A *mean, *invstd, *weight, *bias;
  const A* var;              // evaluation: in place of invstd
  A *mean_out, *invstd_out;  // evaluation: what the backward needs
  A eps;
  bool relu;

  RF_DEVICE A inverse_deviation(int64_t c) const {
    return var ? 1 / square_root(load<Cache::kCached>(var + c) + eps)
               : load<Cache::kCached>(invstd + c);
  }
  RF_DEVICE Affine<A> coefficients(int64_t c) const {
    return coefficients(c, load<Cache::kCached>(mean + c), inverse_deviation(c));
  }
  RF_DEVICE Affine<A> coefficients(int64_t c, A own_mean, A scale) const {
    return {own_mean, weight ? scale * load<Cache::kCached>(weight + c) : scale,
            bias ? load<Cache::kCached>(bias + c) : A(0)};
  }
  // y of V elements, before the ReLU.
  template <int S, int V>
  RF_DEVICE Vec<T, V> compute(const Vec<T, V>& x_vec, const Vec<T, V>& residual_vec,
                              const Affine<A>* c) const {
    A value[V];
    normalize<S>(x_vec, c, value);
    if (residual) {
      RF_UNROLL
      for (int j = 0; j < V; ++j) value[j] += element(residual_vec, j);
    }
    Vec<T, V> out;
    round_to(&out, value);
    return out;
  }
  // Stores y and returns its mask bits.
  template <int V>
  RF_DEVICE unsigned write(int64_t at, Vec<T, V> out) const {
    unsigned bits = ~0u;
    if (relu) {
      bits = positive_bits(out);
      resnet_fast::relu(&out);
    }
    store_vec<Cache::kKeep>(y + at, out);
    return bits;
  }
};

template <class T, int V, bool kChannelsLast>
RF_KERNEL(kThreads, kBnApplyBlocksPerSm)
bn_apply_kernel(const BnApply<T> p) {
  wait_for_previous_kernel();
  constexpr int U = kBnApplyUnroll;
  const auto load_channel = [&](int64_t c) { return p.coefficients(c); };
  const int64_t whole = whole_groups(p.shape.elements);
  CoefficientCache<Affine<Accumulator<T>>, V, kChannelsLast> cache;
  cache.fill(p.shape, load_channel);
  if (p.var) {
    for (int64_t c = p.shape.thread(); c < p.shape.channels; c += p.shape.threads()) {
      store<Cache::kKeep>(p.mean_out + c, load<Cache::kCached>(p.mean + c));
      store<Cache::kKeep>(p.invstd_out + c, p.inverse_deviation(c));
    }
  }
  sweep<V, U>(p.shape, [&](const int64_t (&at)[U]) {
    Vec<T, V> x[U], residual[U];
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      if (at[u] >= whole) continue;
      x[u] = load_vec<Cache::kStream, V>(p.x + at[u]);
      if (p.residual) residual[u] = load_vec<Cache::kStream, V>(p.residual + at[u]);
    }
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      unsigned bits = 0;
      if (at[u] < whole) {
        cache.with(p.shape, at[u], load_channel, [&](const auto* c, auto stride) {
          x[u] = p.template compute<decltype(stride)::value>(x[u], residual[u], c);
        });
        bits = p.write(at[u], x[u]);
      }
      if (p.mask) store_mask<V>(p.mask, at[u], bits, at[u] < whole);
    }
  });
  handle_tail(p.shape.elements, p.mask, [&](int64_t i) {
    const auto c = load_channel(p.shape.channel(i, kChannelsLast));
    const auto x = load_vec<Cache::kStream, 1>(p.x + i);
    Vec<T, 1> residual = x;
    if (p.residual) residual = load_vec<Cache::kStream, 1>(p.residual + i);
    return (p.write(i, p.template compute<0>(x, residual, &c)) & 1) != 0;
  });
}

}  // namespace resnet_fast
