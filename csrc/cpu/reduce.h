// SPDX-License-Identifier: BSD-3-Clause
// How a kernel reduces an activation to two values a channel, in an order fixed by the shape alone.
//
// A Body adds a pack's contributions to two accumulators in the accumulation type; a block is so
// few packs (64 a lane) that its rounding stays small; blocks are merged in double. Work is cut
// into tasks by the shape, not by the number of threads, and tasks are merged in order: the result
// is bitwise the same from run to run and for any number of threads.
#pragma once

#include "loops.h"

namespace resnet_fast::cpu::RF_ISA {

constexpr int64_t kBlock = 64;              // packs a lane in one block
constexpr int64_t kTaskElements = 1 << 17;  // elements that make a task worth its merging
constexpr int64_t kTasks = 16;
constexpr int64_t kAhead = 2048;  // elements that are fetched ahead

// ---- channels-last ------------------------------------------------------------------------------

// Adds as many of `repeats` periods as go kUnroll at a time; returns how many.
template <int kUnroll, class A, int K, class Body>
RF_INLINE int64_t add_unrolled(const Body& body, const Repeated<A, K>& repeated, int64_t start,
                               int64_t repeats, A* s1, A* s2) {
  constexpr int kSums = kUnroll < 4 ? kUnroll : 4;  // enough that additions need not wait
  const int64_t period = repeated.period;
  Pack<A> c[K];
  int64_t r = 0;
  for (; r + kUnroll <= repeats; r += kUnroll) {
    for (int64_t p = 0; p < period; p += kLanes) {
      repeated.at(p, c);
      Pack<A> a[kSums], b[kSums];
      for (int u = 0; u < kSums; ++u) a[u] = b[u] = broadcast(A(0));
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = start + (r + u) * period + p;
        body.prefetch(i + kAhead);
        body.whole(i, c, a[u % kSums], b[u % kSums]);
      }
      for (int u = kSums / 2; u > 0; u /= 2) {
        for (int v = 0; v < u; ++v) {
          a[v] = a[v] + a[v + u];
          b[v] = b[v] + b[v + u];
        }
      }
      store(s1 + p, load(s1 + p) + a[0]);
      store(s2 + p, load(s2 + p) + b[0]);
    }
  }
  return r;
}

// Adds `repeats` periods, from element `start` on, to s1 and s2 (one accumulator a lane).
template <class A, int K, class Body>
void add_block(const Body& body, const Repeated<A, K>& repeated, int64_t start, int64_t repeats,
               A* s1, A* s2) {
  const int64_t period = repeated.period;
  std::memset(s1, 0, period * sizeof(A));
  std::memset(s2, 0, period * sizeof(A));
  // Rows a power of two apart share cache sets: where a row is also written, fewer at a time.
  int64_t r = body.writes() ? add_unrolled<4>(body, repeated, start, repeats, s1, s2)
                            : add_unrolled<8>(body, repeated, start, repeats, s1, s2);
  for (; r < repeats; ++r) {
    add_unrolled<1>(body, repeated, start + r * period, 1, s1, s2);
  }
}

// The rows that are left when whole periods are done: fewer than a period's elements.
template <class A, int K, class Body>
void add_rest(const Body& body, const Repeated<A, K>& repeated, int64_t start, int64_t numel, A* s1,
              A* s2) {
  std::memset(s1, 0, repeated.period * sizeof(A));
  std::memset(s2, 0, repeated.period * sizeof(A));
  Pack<A> c[K];
  for (int64_t p = 0; start + p < numel; p += kLanes) {
    repeated.at(p, c);
    Pack<A> a = broadcast(A(0)), b = a;
    if (start + p + kLanes <= numel) {
      body.whole(start + p, c, a, b);
    } else {
      body.part(start + p, 0, int(numel - start - p), c, a, b);
    }
    store(s1 + p, a);
    store(s2 + p, b);
  }
}

// How many tasks the whole periods are cut into; task t has [repeats * t / tasks, ... (t + 1)).
inline int64_t tasks_for(int64_t numel) {
  return maximum(1, minimum(kTasks, numel / kTaskElements));
}

// ---- planes
// --------------------------------------------------------------------------------------

// The images are cut into chunks where there are too few channels to share out.
inline int64_t chunks_for(const Geometry& g) {
  return maximum(1, minimum(g.rows, ceil_div(kTasks, g.channels)));
}

// Calls task(chunk * C + c, c, first image, last image) for each channel and chunk, in parallel.
template <class Task>
void for_each_plane_task(const Geometry& g, const Parallel& parallel, const Task& task) {
  const int64_t chunks = chunks_for(g), size = ceil_div(g.rows, chunks);
  const int64_t grain = ceil_div(kGrain, size * g.inner);
  parallel_for(parallel, chunks * g.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t / g.channels * size;
      task(t, t % g.channels, minimum(first, g.rows), minimum(first + size, g.rows));
    }
  });
}

// One channel's two accumulators while its planes go by; flush(a, b, count) ends a block.
template <class A, int K, class Body, class Flush>
struct PlaneAccumulator {
  const Body& body;
  const Flush& flush;
  Pack<A> a = broadcast(A(0)), b = broadcast(A(0));
  int64_t count = 0;

  RF_INLINE void whole(int64_t i, const Pack<A> (&c)[K]) {
    body.whole(i, c, a, b);
    count += kLanes;
    if (count >= kBlock * kLanes) end_block();
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A> (&c)[K]) {
    body.part(i, lo, hi, c, a, b);
    count += hi - lo;
  }
  RF_INLINE void end_block() {
    if (count > 0) flush(sum(a), sum(b), count);
    a = b = broadcast(A(0));
    count = 0;
  }
};

// All of channel `channel` in the images [first, last).
template <class A, int K, class Body, class Flush>
void accumulate_planes(const Geometry& g, int64_t channel, int64_t first, int64_t last,
                       const Pack<A> (&c)[K], const Body& body, const Flush& flush) {
  PlaneAccumulator<A, K, Body, Flush> accumulator{body, flush};
  for (int64_t n = first; n < last; ++n) {
    const int64_t begin = (n * g.channels + channel) * g.inner;
    walk_run(begin, begin + g.inner, c, accumulator);
  }
  accumulator.end_block();
}

}  // namespace resnet_fast::cpu::RF_ISA
