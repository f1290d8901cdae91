// SPDX-License-Identifier: BSD-3-Clause
// Loads and stores of sixteen elements of any dtype, whole or in part, with round-to-nearest-even.
#pragma once

#include "simd.h"

namespace resnet_fast::cpu::RF_ISA {

// The largest accumulated value that rounds to zero or below: where ReLU's rounded output is 0.
template <class T>
constexpr Accumulate<T> kRoundsToZero = 0;
template <>
inline constexpr float kRoundsToZero<Half> = 0x1p-25f;
template <>
inline constexpr float kRoundsToZero<BFloat16> = 0x1p-134f;

typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(64)));

// ---- sixteen bit floats
// --------------------------------------------------------------------------

RF_INLINE Bits widen(const uint16_t* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return __builtin_convertvector(w, Bits);
}

RF_INLINE Pack<float> as_floats(const Bits& bits) {
  Pack<float> r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

RF_INLINE Words narrow_bfloat16(const Pack<float>& a) {
  Bits u;
  std::memcpy(&u, &a, sizeof u);
  const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits magnitude = u & 0x7fffffffu;
  const Bits quiet_nan = Bits{} + 0x7fc0u;
  return __builtin_convertvector(magnitude > 0x7f800000u ? quiet_nan : rounded, Words);
}

#if !defined(__F16C__) && !defined(__AVX512F__)
// Half precision by shifting the exponent and letting the processor round. What is compared is
// below 2^31 and taken as signed, which SSE2 has instructions for. Called, not inlined: long beside
// a call's cost, and the compiler spent half its time on the copies.
typedef int32_t Signed __attribute__((vector_size(64)));

RF_INLINE Signed as_signed(const Pack<float>& a) {
  Signed r;
  std::memcpy(&r, &a, sizeof r);
  return r;
}

inline __attribute__((noinline)) Pack<float> half_to_float(const Bits& h) {
  const Bits rest = (h & 0x7fffu) << 13;
  // Exact: moves the bias from 15 to 127, subnormals too.
  const Signed finite = as_signed(as_floats(rest) * broadcast(0x1p112f));
  const Signed special = (Signed)(rest | 0x7f800000u);
  const Signed magnitude = (Signed)rest >= 0x7c00 << 13 ? special : finite;
  return as_floats((Bits)magnitude | (h & 0x8000u) << 16);
}

inline __attribute__((noinline)) Bits float_to_half(const Pack<float>& a) {
  const Bits bits = (Bits)as_signed(a);
  const Signed magnitude = (Signed)(bits & 0x7fffffffu);
  // Subnormal in half: adding 0.5 aligns and rounds the fraction.
  const Signed small = as_signed(as_floats((Bits)magnitude) + broadcast(0.5f)) - 0x3f000000;
  const Bits odd = ((Bits)magnitude >> 13) & 1u;
  const Signed normal = (Signed)(((Bits)magnitude + 0xc8000fffu + odd) >> 13);
  Signed r = magnitude < 0x38800000 ? small : normal;
  r = magnitude >= 0x47800000 ? Signed{} + 0x7c00 : r;
  r = magnitude > 0x7f800000 ? Signed{} + 0x7e00 : r;
  return (Bits)r | (bits >> 16 & 0x8000u);
}
#endif

RF_INLINE Pack<float> load(const Half* p) {
#if defined(__AVX512F__)
  Pack<float> r;
  r.v[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return r;
#elif defined(__F16C__)
  Pack<float> r;
  for (int i = 0; i < 2; ++i) {
    r.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
  }
  return r;
#else
  return half_to_float(widen(reinterpret_cast<const uint16_t*>(p)));
#endif
}

RF_INLINE Words narrow_half(const Pack<float>& a) {
#if defined(__AVX512F__)
  Words w;
  const __m256i r = _mm512_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(&w, &r, sizeof w);
  return w;
#elif defined(__F16C__)
  Words w;
  for (int i = 0; i < 2; ++i) {
    const __m128i r = _mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(reinterpret_cast<char*>(&w) + 16 * i, &r, sizeof r);
  }
  return w;
#else
  return __builtin_convertvector(float_to_half(a), Words);
#endif
}

// ---- whole packs
// ---------------------------------------------------------------------------------

template <class A>
RF_INLINE Pack<A> load(const A* p) {
  Pack<A> r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

RF_INLINE Pack<float> load(const BFloat16* p) {
  return as_floats(widen(reinterpret_cast<const uint16_t*>(p)) << 16);
}

template <class A>
RF_INLINE void store(A* p, const Pack<A>& a) {
  std::memcpy(p, &a, sizeof a);
}

RF_INLINE void store(BFloat16* p, const Pack<float>& a) {
  const Words w = narrow_bfloat16(a);
  std::memcpy(p, &w, sizeof w);
}

RF_INLINE void store(Half* p, const Pack<float>& a) {
  const Words w = narrow_half(a);
  std::memcpy(p, &w, sizeof w);
}

// The values as the dtype holds them.
template <class T>
RF_INLINE Pack<Accumulate<T>> rounded(const Pack<Accumulate<T>>& a) {
  if constexpr (sizeof(T) >= 4) {
    return a;
  } else {
    T lanes[kLanes];
    store(lanes, a);
    return load(lanes);
  }
}

// Past the cache, for outputs larger than it; p must lie on a multiple of the vector's size.
template <class Vector>
RF_INLINE void stream_vector(void* p, const Vector& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Vector) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
    return;
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

template <class A>
RF_INLINE void stream(A* p, const Pack<A>& a) {
  RF_FOR_VECTORS(A) stream_vector(p + i * Pack<A>::kWidth, a.v[i]);
}

RF_INLINE void stream(BFloat16* p, const Pack<float>& a) { stream_vector(p, narrow_bfloat16(a)); }

RF_INLINE void stream(Half* p, const Pack<float>& a) { stream_vector(p, narrow_half(a)); }

// Streamed stores are weakly ordered: fence before another thread reads them.
RF_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
RF_INLINE void put(T* p, const Pack<Accumulate<T>>& a, bool streamed) {
  if (streamed) {
    stream(p, a);
  } else {
    store(p, a);
  }
}

// ---- packs in part: lanes lo to hi of the sixteen at p
// -------------------------------------------

template <class T>
RF_INLINE Pack<Accumulate<T>> load_part(const T* p, int lo, int hi) {
  T lanes[kLanes];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes + lo, p + lo, (hi - lo) * sizeof(T));
  return load(lanes);
}

template <class T>
RF_INLINE void store_part(T* p, const Pack<Accumulate<T>>& a, int lo, int hi) {
  T lanes[kLanes];
  store(lanes, a);
  std::memcpy(p + lo, lanes + lo, (hi - lo) * sizeof(T));
}

#if defined(__AVX512F__)
// Lanes outside are not touched, so they may lie outside of the tensor.
RF_INLINE Pack<float> load_part(const float* p, int lo, int hi) {
  Pack<float> r;
  r.v[0] = _mm512_maskz_loadu_ps(lane_bits(lo, hi), p);
  return r;
}

RF_INLINE void store_part(float* p, const Pack<float>& a, int lo, int hi) {
  _mm512_mask_storeu_ps(p, lane_bits(lo, hi), a.v[0]);
}
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
RF_INLINE Pack<float> load_part(const Half* p, int lo, int hi) {
  Pack<float> r;
  r.v[0] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_bits(lo, hi), p));
  return r;
}

RF_INLINE Pack<float> load_part(const BFloat16* p, int lo, int hi) {
  const __m256i words = _mm256_maskz_loadu_epi16(lane_bits(lo, hi), p);
  return as_floats((Bits)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

RF_INLINE void store_part(Half* p, const Pack<float>& a, int lo, int hi) {
  _mm256_mask_storeu_epi16(p, lane_bits(lo, hi), (__m256i)narrow_half(a));
}

RF_INLINE void store_part(BFloat16* p, const Pack<float>& a, int lo, int hi) {
  _mm256_mask_storeu_epi16(p, lane_bits(lo, hi), (__m256i)narrow_bfloat16(a));
}
#endif

// Mask words of parts are put together from the first part on: the one that holds lane 0 sets the
// word, later ones add to it. All parts of a word belong to one thread.
RF_INLINE void store_mask_part(uint16_t* word, uint16_t bits, int lo, int hi) {
  bits &= lane_bits(lo, hi);
  *word = lo == 0 ? bits : uint16_t(*word | bits);
}

}  // namespace resnet_fast::cpu::RF_ISA
