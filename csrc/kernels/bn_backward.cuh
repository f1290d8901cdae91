// SPDX-License-Identifier: BSD-3-Clause
// Batch-norm backward. With g = grad where the ReLU let it pass, d = x - mean, n = elements of a
// channel:  dresidual = g,  dbias = sum g,  dweight = invstd * sum g*d,
//           dx = scale * (g - sum g / n - d * invstd^2 * sum g*d / n)   training
//           dx = scale * g                                              evaluation
// reduce: the sums; writes dresidual and, in evaluation, dx on the way. apply: dx from the sums
// (training), or dx and dresidual where no sums are wanted. dx may be grad itself: of the kernels
// the last one writes it, and there each element by the thread that has read it.
//
// Layouts, dtypes: as bn_stats and bn_apply.
// Bytes moved, E elements of b bytes, C channels, S splits, parameters of a bytes:
//          reduce 2bE (+ E/8 with mask) (+ bE for dresidual) (+ bE for dx in evaluation) + 4aCS +
//          7aC apply  3bE (+ E/8 with mask, unless dresidual was written and is read for g) + 6aC;
//                 evaluation 2bE (+ E/8 or + bE for x, mask recomputed) (+ bE for dresidual).
// Shape:   as bn_stats and bn_apply; the mask is recomputed by the forward's own arithmetic.
#pragma once

#include "kernels/reduce.cuh"
#include "kernels/sweep.cuh"

namespace resnet_fast {

constexpr int kBnGradBlocksPerSm = 2;
constexpr int kBnGradApplyBlocksPerSm = 2;
constexpr int kBnGradApplyUnroll = 4;

enum class MaskFrom : int { kNothing, kBits, kInput };  // no ReLU; stored; recomputed from x

// What both kernels read.
template <class T>
struct BnGradInput {
  using A = Accumulator<T>;
  const T *grad, *x;
  const uint8_t* mask;
  const A *mean, *invstd, *weight, *bias;
  MaskFrom mask_from;

  RF_DEVICE Affine<A> coefficients(int64_t c) const {
    const A scale = load<Cache::kCached>(invstd + c);
    return {load<Cache::kCached>(mean + c),
            weight ? scale * load<Cache::kCached>(weight + c) : scale,
            bias ? load<Cache::kCached>(bias + c) : A(0)};
  }
  // Zeroes the gradient where the ReLU stopped it.
  template <int S, int V, class Coefficients>
  RF_DEVICE void mask_gradient(Vec<T, V>* g, const Vec<T, V>& x_vec, unsigned bits,
                               const Coefficients* c) const {
    if (mask_from == MaskFrom::kNothing) return;
    if (mask_from == MaskFrom::kInput) {
      A value[V];
      normalize<S>(x_vec, c, value);
      Vec<T, V> y;
      round_to(&y, value);
      bits = positive_bits(y);
    }
    keep_where(g, bits);
  }
};

template <class T, int V>
struct BnGrad {
  using Element = T;
  using A = Accumulator<T>;
  using Merge = MergeSums;
  static constexpr int kV = V;
  static constexpr int kU = V == 1 ? 8 : 4;
  static constexpr int kBlocksPerSm = kBnGradBlocksPerSm;
  struct Channels {
    Affine<A> affine[V];
  };

  BnGradInput<T> in;
  T *dresidual, *dx;  // dx: evaluation only
  Partials<A> partials;
  A *sums, *dweight, *dbias;    // sums: (2, C), of g and of g * d
  double *wide_sum, *wide_dot;  // not null: these sums, for other processes, and none of the above

  RF_DEVICE void prepare(const int64_t (&channel)[V], Channels* channels) const {
    RF_UNROLL
    for (int j = 0; j < V; ++j) channels->affine[j] = in.coefficients(channel[j]);
  }
  RF_DEVICE void accumulate(const int64_t (&offset)[kU], const Channels& channels, A& n, A (&p)[V],
                            A (&q)[V]) const {
    Vec<T, V> g[kU], x[kU];
    unsigned bits[kU];
    RF_UNROLL
    for (int u = 0; u < kU; ++u) {
      if (offset[u] < 0) continue;
      g[u] = load_vec<Cache::kKeep, V>(in.grad + offset[u]);
      x[u] = load_vec<Cache::kKeep, V>(in.x + offset[u]);
      if (in.mask_from == MaskFrom::kBits) bits[u] = load_mask<V>(in.mask, offset[u]);
    }
    A p_tile[V] = {}, q_tile[V] = {};
    RF_UNROLL
    for (int u = 0; u < kU; ++u) {
      if (offset[u] < 0) continue;
      in.template mask_gradient<1>(&g[u], x[u], bits[u], channels.affine);
      if (dresidual) store_vec<Cache::kKeep>(dresidual + offset[u], g[u]);
      A scaled[V];
      RF_UNROLL
      for (int j = 0; j < V; ++j) {
        const A g_j = element(g[u], j);
        p_tile[j] += g_j;
        q_tile[j] = multiply_add(g_j, element(x[u], j) - channels.affine[j].mean, q_tile[j]);
        scaled[j] = g_j * channels.affine[j].scale;
      }
      if (dx) {
        round_to(&g[u], scaled);
        store_vec<Cache::kKeep>(dx + offset[u], g[u]);
      }
    }
    n = 1;  // the sums need no count; anything but 0 says that there are some
    RF_UNROLL
    for (int j = 0; j < V; ++j) p[j] += p_tile[j], q[j] += q_tile[j];
  }
  RF_DEVICE void finish(int64_t channel, A, A p, A q) const {
    if (wide_sum) {
      store<Cache::kKeep>(wide_sum + channel, static_cast<double>(p));
      store<Cache::kKeep>(wide_dot + channel, static_cast<double>(q));
      return;
    }
    store<Cache::kKeep>(sums + channel, p);
    store<Cache::kKeep>(sums + partials.channels + channel, q);
    if (dbias) store<Cache::kKeep>(dbias + channel, p);
    if (dweight)
      store<Cache::kKeep>(dweight + channel, load<Cache::kCached>(in.invstd + channel) * q);
  }
};

template <class A>
struct GradCoefficients {
  A mean, scale, bias, mean_grad, slope;
};

template <class T>
struct BnGradApply {
  using A = Accumulator<T>;
  SweepShape shape;
  BnGradInput<T> in;
  T *dx, *dresidual;
  const A *sum, *dot;  // of g and of g * d; null in evaluation
  A count;             // elements of a channel

  RF_DEVICE bool reads_x() const { return sum || in.mask_from == MaskFrom::kInput; }
  RF_DEVICE GradCoefficients<A> coefficients(int64_t c) const {
    const Affine<A> affine = in.coefficients(c);
    GradCoefficients<A> result{affine.mean, affine.scale, affine.bias, 0, 0};
    if (sum) {
      const A invstd = load<Cache::kCached>(in.invstd + c);
      result.mean_grad = load<Cache::kCached>(sum + c) / count;
      result.slope = load<Cache::kCached>(dot + c) / count * invstd * invstd;
    }
    return result;
  }
  // Masks g; returns dx.
  template <int S, int V>
  RF_DEVICE Vec<T, V> compute(Vec<T, V>* g, const Vec<T, V>& x, unsigned bits,
                              const GradCoefficients<A>* c) const {
    in.template mask_gradient<S>(g, x, bits, c);
    A value[V];
    RF_UNROLL
    for (int j = 0; j < V; ++j) {
      value[j] = element(*g, j);
      if (sum)
        value[j] = multiply_add(c[S * j].mean - element(x, j), c[S * j].slope,
                                value[j] - c[S * j].mean_grad);
      value[j] *= c[S * j].scale;
    }
    Vec<T, V> out;
    round_to(&out, value);
    return out;
  }
  template <int V>
  RF_DEVICE void write(int64_t at, const Vec<T, V>& g, const Vec<T, V>& dx_vec) const {
    if (dresidual) store_vec<Cache::kKeep>(dresidual + at, g);
    if (dx) store_vec<Cache::kKeep>(dx + at, dx_vec);
  }
};

template <class T, int V, bool kChannelsLast>
RF_KERNEL(kThreads, kBnGradApplyBlocksPerSm)
bn_grad_apply_kernel(const BnGradApply<T> p) {
  wait_for_previous_kernel();
  constexpr int U = kBnGradApplyUnroll;
  const auto load_channel = [&](int64_t c) { return p.coefficients(c); };
  const int64_t whole = whole_groups(p.shape.elements);
  CoefficientCache<GradCoefficients<Accumulator<T>>, V, kChannelsLast> cache;
  cache.fill(p.shape, load_channel);
  sweep<V, U>(p.shape, [&](const int64_t (&at)[U]) {
    Vec<T, V> g[U], x[U];
    unsigned bits[U];
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      if (at[u] >= whole) continue;
      g[u] = load_vec<Cache::kStream, V>(p.in.grad + at[u]);
      if (p.reads_x()) x[u] = load_vec<Cache::kStream, V>(p.in.x + at[u]);
      if (p.in.mask_from == MaskFrom::kBits) bits[u] = load_mask<V>(p.in.mask, at[u]);
    }
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      if (at[u] >= whole) continue;
      cache.with(p.shape, at[u], load_channel, [&](const auto* c, auto stride) {
        x[u] = p.template compute<decltype(stride)::value>(&g[u], x[u], bits[u], c);
      });
      p.write(at[u], g[u], x[u]);
    }
  });
  handle_tail(p.shape.elements, nullptr, [&](int64_t i) {
    const auto c = load_channel(p.shape.channel(i, kChannelsLast));
    auto g = load_vec<Cache::kStream, 1>(p.in.grad + i);
    Vec<T, 1> x = g;
    if (p.reads_x()) x = load_vec<Cache::kStream, 1>(p.in.x + i);
    const unsigned bit = p.in.mask_from == MaskFrom::kBits ? load_mask<1>(p.in.mask, i) : 1;
    const auto dx = p.template compute<0>(&g, x, bit, &c);
    p.write(i, g, dx);
    return true;
  });
}

}  // namespace resnet_fast
