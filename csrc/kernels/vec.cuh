// SPDX-License-Identifier: BSD-3-Clause
// Element types and vectors of them: 16-byte loads and stores, conversion to and from the type that
// arithmetic is done in, the 1-bit mask, and division by a number known at launch.
#pragma once

#include <type_traits>

#include "kernels/platform.cuh"

namespace resnet_fast {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte access

// V elements as they lie in memory. Two 16-bit elements stay in one 32-bit word until they are
// used: unpacked on arrival, they would take twice the registers.
template <class T, int V>
constexpr bool kPaired = sizeof(T) == 2 && V % 2 == 0;
template <class T, int V>
struct alignas(sizeof(T) * V) Vec {
  std::conditional_t<kPaired<T, V>, uint32_t, T> word[kPaired<T, V> ? V / 2 : V];
};

RF_HOST_DEVICE double to_accumulator(double x) { return x; }
RF_HOST_DEVICE float to_accumulator(float x) { return x; }

#if defined(RF_EMULATE)
template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float to_accumulator(half_t x) { return static_cast<float>(bit_cast<_Float16>(x)); }
inline float to_accumulator(bfloat16_t x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
template <class T>
T rounded(Accumulator<T> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else if constexpr (std::is_same_v<T, half_t>) {
    return bit_cast<half_t>(static_cast<_Float16>(x));
  } else {
    const auto bits = bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};  // ties to even
  }
}
template <class T>
uint32_t rounded_pair(float low, float high) {
  return rounded<T>(low).bits | uint32_t{rounded<T>(high).bits} << 16;
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
#else
RF_DEVICE float to_accumulator(half_t x) { return __half2float(__ushort_as_half(x.bits)); }
RF_DEVICE float to_accumulator(bfloat16_t x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
template <class T>
RF_DEVICE T rounded(Accumulator<T> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else if constexpr (std::is_same_v<T, half_t>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  }
}
template <class T>
RF_DEVICE uint32_t rounded_pair(float low, float high) {  // one instruction
  uint32_t bits;
  if constexpr (std::is_same_v<T, half_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}
RF_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RF_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
RF_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
RF_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
#endif

// Element j of a vector, in the type of the arithmetic.
template <class T, int V>
RF_DEVICE Accumulator<T> element(const Vec<T, V>& vec, int j) {
  if constexpr (kPaired<T, V>) {
    const uint32_t word = vec.word[j / 2];
    return to_accumulator(T{static_cast<uint16_t>(j % 2 ? word >> 16 : word)});
  } else {
    return to_accumulator(vec.word[j]);
  }
}
template <class T, int V>
RF_DEVICE void round_to(Vec<T, V>* vec, const Accumulator<T> (&values)[V]) {
  if constexpr (kPaired<T, V>) {
    RF_UNROLL
    for (int j = 0; j < V; j += 2) vec->word[j / 2] = rounded_pair<T>(values[j], values[j + 1]);
  } else {
    RF_UNROLL
    for (int j = 0; j < V; ++j) vec->word[j] = rounded<T>(values[j]);
  }
}
// Zero where the bit is not set.
template <class T, int V>
RF_DEVICE void keep_where(Vec<T, V>* vec, unsigned bits) {
  if constexpr (kPaired<T, V>) {
    RF_UNROLL
    for (int j = 0; j < V; j += 2)
      vec->word[j / 2] &= (bits >> j & 1) * 0xffffu | (bits >> (j + 1) & 1) * 0xffff0000u;
  } else {
    RF_UNROLL
    for (int j = 0; j < V; ++j)
      if (!(bits >> j & 1)) vec->word[j] = T{};
  }
}

// V elements from an address aligned to V * sizeof(T) bytes.
template <Cache cache, int V, class T>
RF_DEVICE Vec<T, V> load_vec(const T* address) {
  return load<cache>(reinterpret_cast<const Vec<T, V>*>(address));
}
template <Cache cache, class T, int V>
RF_DEVICE void store_vec(T* address, const Vec<T, V>& value) {
  store<cache>(reinterpret_cast<Vec<T, V>*>(address), value);
}

// Bit j: the gradient passes the ReLU at element j. Judges the *rounded* value; NaN passes.
template <class T, int V>
RF_DEVICE unsigned positive_bits(const Vec<T, V>& y) {
  unsigned bits = 0;
  RF_UNROLL
  for (int j = 0; j < V; ++j) bits |= static_cast<unsigned>(!(element(y, j) <= 0)) << j;
  return bits;
}

// max(y, 0) that hands NaN and -0 on, as torch.relu does on a CPU and, since PyTorch's pull request
// 185354, on a GPU; before that, a GPU's gave +0 for -0.
template <class T, int V>
RF_DEVICE void relu(Vec<T, V>* y) {
  unsigned bits = 0;
  RF_UNROLL
  for (int j = 0; j < V; ++j) bits |= static_cast<unsigned>(!(element(*y, j) < 0)) << j;
  keep_where(y, bits);
}

// The 1-bit mask: bit i % 8 of byte i / 8 belongs to element i in memory order; padded with zeros
// to 2 * ceil(elements / 16) bytes.
RF_HOST_DEVICE int64_t mask_bytes(int64_t elements) { return 2 * ((elements + 15) / 16); }

// The part of a tensor that whole 16-element groups cover. Vectors of any type and bytes of the
// mask divide it evenly; the up to 15 elements behind it are left to one warp.
RF_HOST_DEVICE int64_t whole_groups(int64_t elements) { return elements & ~int64_t{15}; }

// Stores the mask bits of the vector at element `first`. Lane i + 1 holds the vector that follows
// lane i's; the whole warp calls. Where a byte spans several lanes, they bring it together.
template <int V>
RF_DEVICE void store_mask(uint8_t* mask, int64_t first, unsigned bits, bool active) {
  if constexpr (V == 8) {
    if (active) store<Cache::kKeep>(mask + first / 8, static_cast<uint8_t>(bits));
  } else {
    constexpr int kLanes = 8 / V;
    const int lane = threadIdx.x % 32;
    bits = active ? bits << (V * (lane % kLanes)) : 0;
    RF_UNROLL
    for (int step = 1; step < kLanes; step *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, step);
    if (active && lane % kLanes == 0)
      store<Cache::kKeep>(mask + first / 8, static_cast<uint8_t>(bits));
  }
}

// The mask bits of the V elements from `first` on, a multiple of V.
template <int V>
RF_DEVICE unsigned load_mask(const uint8_t* mask, int64_t first) {
  const unsigned byte = load<Cache::kStream>(mask + first / 8);
  return V == 8 ? byte : byte >> (first % 8) & ((1u << V) - 1);
}

// The last 0 to 15 elements and the mask's last two bytes, one element per lane of one warp.
// element(i) handles element i and returns its mask bit. Called by every thread of every block.
template <class Element>
RF_DEVICE void handle_tail(int64_t elements, uint8_t* mask, const Element& element) {
  const int64_t done = whole_groups(elements);
  if (done == elements || blockIdx.x != 0 || threadIdx.x >= 32) return;
  const int64_t i = done + threadIdx.x;
  const bool bit = i < elements && element(i);
  const unsigned bits = __ballot_sync(0xffffffffu, bit);
  if (mask && threadIdx.x < 2)
    store<Cache::kKeep>(mask + done / 8 + threadIdx.x,
                        static_cast<uint8_t>(bits >> (8 * threadIdx.x)));
}

// Quotient by a divisor fixed at launch: a multiplication and a shift where the dividends fit in 31
// bits (Granlund and Montgomery), a true 64-bit division otherwise.
struct Divider {
  int64_t divisor = 1;
  uint32_t multiplier = 0;  // 0: use the true division
  int shift = 0;

  Divider() = default;
  Divider(int64_t divisor, int64_t largest_dividend) : divisor(divisor) {
    if (largest_dividend >= int64_t{1} << 31 || divisor >= int64_t{1} << 31) return;
    int log2 = 0;
    while ((int64_t{1} << log2) < divisor) ++log2;
    shift = 31 + log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  RF_HOST_DEVICE int64_t divide(int64_t n) const {
    if (multiplier == 0) return n / divisor;
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >>
                                shift);
  }
};

}  // namespace resnet_fast
