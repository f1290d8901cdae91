// SPDX-License-Identifier: BSD-3-Clause
// How a kernel walks through an activation: packs of sixteen elements in memory order.
//
// A whole pack starts at a multiple of sixteen, so that it is one mask word and one aligned vector.
// * Channels-last: the tensor is one flat run in which the channel's coefficients repeat. They are
//   written out to a period that packs divide (a multiple of lcm(C, 16)); any C, odd ones too, then
//   runs at full vector width with no tail but the tensor's own.
// * Contiguous: each plane (n, c) has one set of coefficients; a plane that does not start or end
// at
//   a multiple of sixteen begins and ends with a pack in part.
#pragma once

#include <cstdlib>

#include "load_store.h"
#include "params.h"

namespace resnet_fast::cpu::RF_ISA {

// Elements that a thread should have to be worth waking.
constexpr int64_t kGrain = 32768;

RF_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
RF_INLINE int64_t maximum(int64_t a, int64_t b) { return a < b ? b : a; }
RF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Body>
RF_INLINE void parallel_for(const Parallel& parallel, int64_t n, int64_t grain, const Body& body) {
  if (n <= grain) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
  parallel.run(
      n, maximum(grain, 1),
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// A Parallel that stays in this thread.
inline Parallel serial() {
  return {1, [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
            body(0, n, context);
          }};
}

// Working memory that a thread keeps for its next call: the pages of a fresh block are faulted in
// one by one. Blocks are handed out and given back like a stack.
class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() {
    for (Block& block : blocks_) std::free(block.p);
  }
  // Null where the block is too large to be kept, or its edges are watched.
  void* take(int64_t bytes) {
    if (kWatched || taken_ == kBlocks || bytes > kMost) return nullptr;
    bytes = maximum(bytes, 64);
    Block& block = blocks_[taken_++];
    if (block.bytes < bytes) {
      std::free(block.p);
      block = {allocate(bytes), bytes};
    }
    return block.p;
  }
  void give_back() { --taken_; }
  static void* allocate(int64_t bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size_t(maximum(bytes, 1))) != 0) std::abort();
    return p;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kWatched = true;
#else
  static constexpr bool kWatched = false;
#endif
  static constexpr int kBlocks = 4;
  static constexpr int64_t kMost = 14 << 20;
  struct Block {
    void* p = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[kBlocks];
  int taken_ = 0;
};

inline Kept& kept() {
  static thread_local Kept blocks;
  return blocks;
}

// Working memory of one call, aligned to a vector, of the thread that makes it.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n) : p_(kept().take(n * int64_t(sizeof(A)))), kept_(p_ != nullptr) {
    if (!kept_) p_ = Kept::allocate(n * int64_t(sizeof(A)));
  }
  ~Scratch() {
    if (kept_) {
      kept().give_back();
    } else {
      std::free(p_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return static_cast<A*>(p_); }

 private:
  void* p_;
  const bool kept_;
};

// The length after which coefficients repeat, in elements: a multiple of C and of 16, 128 or more.
inline int64_t period_of(int64_t channels) {
  int64_t period = channels;
  while (period % kLanes != 0) period += channels;
  while (period < 128) period *= 2;
  return period;
}

// K coefficients per channel, each written out to the period.
template <class A, int K>
class Repeated {
 public:
  Repeated(const A* const (&per_channel)[K], int64_t channels)
      : period(period_of(channels)), memory_(K * period) {
    for (int k = 0; k < K; ++k) {
      for (int64_t p = 0; p < period; p += channels) {
        std::memcpy(memory_.get() + k * period + p, per_channel[k], channels * sizeof(A));
      }
    }
  }
  RF_INLINE void at(int64_t p, Pack<A> (&c)[K]) const {
    for (int k = 0; k < K; ++k) c[k] = load(memory_.get() + k * period + p);
  }
  A* array(int k) const { return memory_.get() + k * period; }
  const int64_t period;

 private:
  Scratch<A> memory_;
};

// Calls body.whole(i, c) and body.part(i, lo, hi, c) for the elements [begin, end) of memory that
// share coefficients c.
template <class Body, class Coefficients>
RF_INLINE void walk_run(int64_t begin, int64_t end, const Coefficients& c, Body&& body) {
  int64_t i = begin / kLanes * kLanes;
  if (i < begin) {
    body.part(i, int(begin - i), int(minimum(end - i, kLanes)), c);
    i += kLanes;
  }
  for (; i + kLanes <= end; i += kLanes) body.whole(i, c);
  if (i < end) body.part(i, 0, int(end - i), c);
}

template <class A, int K, class Body>
void walk_rows(const Geometry& g, const A* const (&coefficients)[K], const Parallel& parallel,
               const Body& body) {
  const Repeated<A, K> repeated(coefficients, g.channels);
  const int64_t period = repeated.period, numel = g.numel(), repeats = numel / period;
  parallel_for(parallel, repeats, ceil_div(kGrain, period), [&](int64_t begin, int64_t end) {
    Pack<A> c[K];
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t p = 0; p < period; p += kLanes) {
        repeated.at(p, c);
        body.whole(r * period + p, c);
      }
    }
    body.finish();
  });
  Pack<A> c[K];
  for (int64_t i = repeats * period; i < numel; i += kLanes) {
    repeated.at(i - repeats * period, c);
    if (i + kLanes <= numel) {
      body.whole(i, c);
    } else {
      body.part(i, 0, int(numel - i), c);
    }
  }
  body.finish();
}

template <class A, int K, class Body>
void walk_planes(const Geometry& g, const A* const (&coefficients)[K], const Parallel& parallel,
                 const Body& body) {
  // Planes come in groups that end at a mask word, so that no word is shared by two threads.
  int64_t group = 1;
  while (group * g.inner % kLanes != 0) group *= 2;
  const int64_t planes = g.rows * g.channels, groups = ceil_div(planes, group);
  const int64_t grain = ceil_div(kGrain, group * g.inner);
  parallel_for(parallel, groups, grain, [&](int64_t begin, int64_t end) {
    Pack<A> c[K];
    int64_t channel = begin * group % g.channels;  // counted on: a division a plane is dear
    for (int64_t p = begin * group; p < minimum(end * group, planes); ++p) {
      for (int k = 0; k < K; ++k) c[k] = broadcast(coefficients[k][channel]);
      walk_run(p * g.inner, (p + 1) * g.inner, c, body);
      if (++channel == g.channels) channel = 0;
    }
    body.finish();
  });
}

// Every element once, with its channel's coefficients.
template <class A, int K, class Body>
void walk(const Geometry& g, const A* const (&coefficients)[K], const Parallel& parallel,
          const Body& body) {
  if (g.inner == 1) {
    walk_rows(g, coefficients, parallel, body);
  } else {
    walk_planes(g, coefficients, parallel, body);
  }
}

}  // namespace resnet_fast::cpu::RF_ISA
