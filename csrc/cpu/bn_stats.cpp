// SPDX-License-Identifier: BSD-3-Clause
// Mean and sum of squared deviations of each channel, reading x once.
//
// Each block is summed about a pivot, the mean of the blocks before it (the first rows are read
// twice to get one): d = x - pivot is exact or nearly so, and the block's mean and M2 follow from
// sum(d) and sum(d * d). The squares so summed are at most a small multiple of the final M2 (a
// block's distance from the mean of those before it is itself part of M2), so no digits cancel: a
// channel of mean 1e4 and standard deviation 1e-2 stays right. Blocks are merged by Chan, Golub &
// LeVeque (1983).
#include "reduce.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

template <class T>
struct Deviations {
  using A = Accumulate<T>;
  const T* x;

  RF_INLINE bool writes() const { return false; }
  RF_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
  RF_INLINE void add(const Pack<A>& d, Pack<A>& a, Pack<A>& b) const {
    a = a + d;
    b = fma(d, d, b);
  }
  RF_INLINE void whole(int64_t i, const Pack<A> (&c)[1], Pack<A>& a, Pack<A>& b) const {
    add(load(x + i) - c[0], a, b);
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A> (&c)[1], Pack<A>& a,
                      Pack<A>& b) const {
    add(select(lane_bits(lo, hi), load_part(x + i, lo, hi) - c[0]), a, b);
  }
};

// (n, mean, m2) of the union with (n_b, mean_b, m2_b).
RF_INLINE void merge(double n, double& mean, double& m2, double n_b, double mean_b, double m2_b) {
  const double total = n + n_b;
  if (!(total > 0)) return;
  const double delta = mean_b - mean, share = n_b / total;
  mean += delta * share;
  m2 += m2_b + delta * delta * n * share;
}

// The same for a block given by its sums about a pivot.
RF_INLINE void merge_block(double n, double& mean, double& m2, double n_b, double pivot, double s1,
                           double s2) {
  const double m2_b = s2 - s1 * s1 / n_b;
  merge(n, mean, m2, n_b, pivot + s1 / n_b, m2_b < 0 ? 0 : m2_b);
}

// merge() for a run of lanes of the same counts: the divisions are done once, and the compiler
// makes vectors of the loop.
void merge_lanes(int64_t lanes, double n, double* __restrict mean, double* __restrict m2,
                 double n_b, const double* __restrict mean_b, const double* __restrict m2_b) {
  const double share = n_b / (n + n_b), between = n * share;
  for (int64_t l = 0; l < lanes; ++l) {
    const double delta = mean_b[l] - mean[l];
    mean[l] += delta * share;
    m2[l] += m2_b[l] + delta * delta * between;
  }
}

// merge_block() likewise; the new means become the next block's pivots.
template <class A>
void merge_block_lanes(int64_t lanes, double n, double* __restrict mean, double* __restrict m2,
                       double n_b, A* __restrict pivot, const A* __restrict s1,
                       const A* __restrict s2) {
  const double each = 1 / n_b, share = n_b / (n + n_b), between = n * share;
  for (int64_t l = 0; l < lanes; ++l) {
    const double sum = double(s1[l]), average = sum * each;
    const double own = double(s2[l]) - sum * average;
    const double delta = double(pivot[l]) + average - mean[l];
    mean[l] += delta * share;
    m2[l] += (own < 0 ? 0 : own) + delta * delta * between;
    pivot[l] = A(mean[l]);
  }
}

constexpr int64_t kPivotRows = 8;

template <class T>
void task_rows(const Deviations<T>& body, Repeated<Accumulate<T>, 1>& pivot, int64_t begin,
               int64_t end, double* mean, double* m2) {
  using A = Accumulate<T>;
  const int64_t period = pivot.period;
  Scratch<A> sums(2 * period);
  A *s1 = sums.get(), *s2 = s1 + period, *centre = pivot.array(0);
  const int64_t first = minimum(kPivotRows, end - begin);
  std::memset(mean, 0, period * sizeof(double));
  std::memset(m2, 0, period * sizeof(double));
  if (first <= 0) return;
  add_block(body, pivot, begin * period, first, s1, s2);
  for (int64_t p = 0; p < period; ++p) centre[p] = A(double(s1[p]) / double(first));
  for (int64_t r = begin; r < end; r += kBlock) {
    const int64_t size = minimum(kBlock, end - r);
    add_block(body, pivot, r * period, size, s1, s2);
    merge_block_lanes(period, double(r - begin), mean, m2, double(size), centre, s1, s2);
  }
}

template <class T>
void stats_rows(const BnStatsParams& p, const Parallel& parallel) {
  using A = Accumulate<T>;
  const Geometry& g = p.geometry;
  const Deviations<T> body{static_cast<const T*>(p.x)};
  const int64_t period = period_of(g.channels), repeats = g.numel() / period;
  const int64_t tasks = minimum(tasks_for(g.numel()), maximum(repeats, 1));
  Scratch<A> zeros(period);
  std::memset(zeros.get(), 0, period * sizeof(A));
  const A* const none[1] = {zeros.get()};
  Scratch<double> partial(2 * tasks * period);
  double* const means = partial.get();
  double* const m2s = means + tasks * period;

  parallel_for(parallel, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Repeated<A, 1> pivot(none, g.channels);
      task_rows(body, pivot, repeats * t / tasks, repeats * (t + 1) / tasks, means + t * period,
                m2s + t * period);
    }
  });
  for (int64_t t = 1; t < tasks; ++t) {
    const double n = double(repeats * t / tasks), n_b = double(repeats * (t + 1) / tasks) - n;
    merge_lanes(period, n, means, m2s, n_b, means + t * period, m2s + t * period);
  }
  // The rows past the last whole period, one value a lane; then the lanes of each channel.
  Repeated<A, 1> zero(none, g.channels);
  Scratch<A> rest(2 * period);
  add_rest(body, zero, repeats * period, g.numel(), rest.get(), rest.get() + period);
  const int64_t rest_elements = g.numel() - repeats * period;
  for (int64_t c = 0; c < g.channels; ++c) {
    double n = 0, mean = 0, m2 = 0;
    for (int64_t l = c; l < period; l += g.channels) {
      merge(n, mean, m2, double(repeats), means[l], m2s[l]);
      n += double(repeats);
      if (l < rest_elements) {
        merge(n, mean, m2, 1, double(rest.get()[l]), 0);
        n += 1;
      }
    }
    p.mean[c] = mean;
    p.m2[c] = m2;
  }
}

template <class T>
void stats_planes(const BnStatsParams& p, const Parallel& parallel) {
  using A = Accumulate<T>;
  const Geometry& g = p.geometry;
  const Deviations<T> body{static_cast<const T*>(p.x)};
  const int64_t items = chunks_for(g) * g.channels;
  Scratch<double> partial(3 * items);
  double* const counts = partial.get();
  double *const means = counts + items, *const m2s = means + items;

  for_each_plane_task(g, parallel, [&](int64_t t, int64_t channel, int64_t first, int64_t last) {
    double n = 0, mean = 0, m2 = 0;
    Pack<A> pivot[1] = {broadcast(A(0))};
    double centre = 0;
    const Geometry start{1, 1, minimum(g.inner, kBlock * kLanes)};
    if (first < last) {
      const Deviations<T> plane{body.x + (first * g.channels + channel) * g.inner};
      accumulate_planes(start, 0, 0, 1, pivot, plane, [&](double s1, double, int64_t count) {
        centre = double(A(s1 / double(count)));
      });
    }
    pivot[0] = broadcast(A(centre));
    accumulate_planes(g, channel, first, last, pivot, body,
                      [&](double s1, double s2, int64_t count) {
                        merge_block(n, mean, m2, double(count), centre, s1, s2);
                        n += double(count);
                        centre = double(A(mean));
                        pivot[0] = broadcast(A(centre));
                      });
    counts[t] = n;
    means[t] = mean;
    m2s[t] = m2;
  });
  for (int64_t c = 0; c < g.channels; ++c) {
    double n = 0, mean = 0, m2 = 0;
    for (int64_t t = c; t < items; t += g.channels) {
      merge(n, mean, m2, counts[t], means[t], m2s[t]);
      n += counts[t];
    }
    p.mean[c] = mean;
    p.m2[c] = m2;
  }
}

}  // namespace

void bn_stats(const BnStatsParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.geometry.inner == 1) {
      stats_rows<T>(p, parallel);
    } else {
      stats_planes<T>(p, parallel);
    }
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
