// SPDX-License-Identifier: BSD-3-Clause
// Batch statistics of every channel: mean, 1 / sqrt(var + eps), and the update of the running ones;
// or, where they are merged with other processes', mean and M2 in float64.
//
// Layouts: channels_last and NCHW, see reduce.cuh for the two access patterns.
// dtypes:  float64, float32, float16, bfloat16; statistics in float32 (float64 for float64).
// Bytes moved, E elements of b bytes, C channels, S splits, statistics of a bytes:
//          bE + 4aCS (partial results, written and read; they stay in L2; none if S = 1) + 4aC.
// Shape:   a thread has 4 independent 16-byte loads in flight and 3 blocks share a multiprocessor:
//          48 KB in flight each. The grid is one wave, so the number of partial results is bounded.
// Numerics: every value is taken relative to the channel's first one, which is exact where the
//          spread is small beside the mean (mean 1e4, deviation 1e-2). A tile's values are reduced
//          in registers, to mean and M2 about that mean, then merged by Chan's rule.
#pragma once

#include "kernels/reduce.cuh"

namespace resnet_fast {

constexpr int kBnStatsBlocksPerSm = 3;

template <class T, int V>
struct BnStats {
  using Element = T;
  using A = Accumulator<T>;
  using Merge = MergeMoments;
  static constexpr int kV = V;
  static constexpr int kU = V == 1 ? 8 : 4;
  static constexpr int kBlocksPerSm = kBnStatsBlocksPerSm;
  struct Channels {
    A origin[V];
  };

  const T* x;
  int64_t channel_stride;  // elements from a channel's first value to the next channel's
  Partials<A> partials;
  A *mean, *invstd, *running_mean, *running_var;
  A momentum, eps;
  double *wide_mean, *wide_m2;  // not null: in place of the four above

  RF_DEVICE A origin(int64_t channel) const {
    return to_accumulator(load<Cache::kCached>(x + channel * channel_stride));
  }
  RF_DEVICE void prepare(const int64_t (&channel)[V], Channels* channels) const {
    RF_UNROLL
    for (int j = 0; j < V; ++j) channels->origin[j] = origin(channel[j]);
  }
  RF_DEVICE void accumulate(const int64_t (&offset)[kU], const Channels& channels, A& n, A (&p)[V],
                            A (&q)[V]) const {
    Vec<T, V> values[kU];
    int count = 0;
    RF_UNROLL
    for (int u = 0; u < kU; ++u) {
      if (offset[u] < 0) continue;
      values[u] = load_vec<Cache::kKeep, V>(x + offset[u]);
      ++count;
    }
    if (count > 0) add(values, offset, count, channels, n, p, q);
  }
  // A tile's `count` values, where their offset is not -1.
  RF_DEVICE void add(const Vec<T, V> (&values)[kU], const int64_t (&offset)[kU], int count,
                     const Channels& channels, A& n, A (&p)[V], A (&q)[V]) const {
    const A tile_n = static_cast<A>(count), share = 1 / tile_n;
    const A total = n + tile_n, weight = tile_n / total, spread = n * weight;
    RF_UNROLL
    for (int j = 0; j < V; ++j) {
      A d[kU], sum = 0, m2 = 0;
      RF_UNROLL
      for (int u = 0; u < kU; ++u) {
        d[u] = offset[u] < 0 ? A(0) : element(values[u], j) - channels.origin[j];
        sum += d[u];
      }
      const A mean_j = sum * share;
      RF_UNROLL
      for (int u = 0; u < kU; ++u) {
        const A e = offset[u] < 0 ? A(0) : d[u] - mean_j;
        m2 = multiply_add(e, e, m2);
      }
      const A delta = mean_j - p[j];
      p[j] = multiply_add(delta, weight, p[j]);
      q[j] = multiply_add(delta * delta, spread, q[j] + m2);
    }
    n = total;
  }
  struct Statistics {
    A mean, invstd;
  };
  // Writes what is wanted, and returns it where that is the batch norm's own.
  RF_DEVICE Statistics finish(int64_t channel, A n, A relative_mean, A m2) const {
    if (wide_mean) {
      store<Cache::kKeep>(wide_mean + channel, static_cast<double>(origin(channel)) +
                                                   static_cast<double>(relative_mean));
      store<Cache::kKeep>(wide_m2 + channel, static_cast<double>(m2));
      return {};
    }
    const A batch_mean = origin(channel) + relative_mean;
    const A batch_var = m2 / n;
    store<Cache::kKeep>(mean + channel, batch_mean);
    const A batch_invstd = 1 / square_root(batch_var + eps);
    store<Cache::kKeep>(invstd + channel, batch_invstd);
    if (running_mean) {
      const A old = load<Cache::kKeep>(running_mean + channel);
      store<Cache::kKeep>(running_mean + channel, (1 - momentum) * old + momentum * batch_mean);
    }
    if (running_var) {
      const A old = load<Cache::kKeep>(running_var + channel);
      store<Cache::kKeep>(running_var + channel, (1 - momentum) * old + momentum * (m2 / (n - 1)));
    }
    return {batch_mean, batch_invstd};
  }
};

}  // namespace resnet_fast
