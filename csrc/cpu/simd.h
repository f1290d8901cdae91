// SPDX-License-Identifier: BSD-3-Clause
// Sixteen lanes of float or double, on whatever vectors the instruction set has.
//
// Everything here lies in a namespace of the instruction set: these files are compiled once for
// each with different flags, and an inline function shared between them would be whichever the
// linker met. NOTE: for the same reason nothing of std:: that is emitted as a function is used in
// csrc/cpu.
//
// Sixteen, because that is one AVX-512 vector of floats and one word of a mask.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef RF_ISA
#error "compile with -DRF_ISA=avx512, avx2 or baseline"
#endif

#if defined(__AVX512F__)
#define RF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RF_VECTOR_BYTES 32
#else
#define RF_VECTOR_BYTES 16
#endif

#define RF_INLINE inline __attribute__((always_inline))
#define RF_LAMBDA __attribute__((always_inline))

namespace resnet_fast::cpu::RF_ISA {

constexpr int kLanes = 16;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateIn<T>::type;

template <class A>
struct Pack {
  typedef A Vector __attribute__((vector_size(RF_VECTOR_BYTES)));
  static constexpr int kVectors = kLanes * sizeof(A) / RF_VECTOR_BYTES;
  static constexpr int kWidth = RF_VECTOR_BYTES / sizeof(A);
  Vector v[kVectors];
};

#define RF_FOR_VECTORS(A) for (int i = 0; i < Pack<A>::kVectors; ++i)

template <class A>
RF_INLINE Pack<A> broadcast(A value) {
  Pack<A> r;
  RF_FOR_VECTORS(A) r.v[i] = value - typename Pack<A>::Vector{};  // value - 0 is value: no addition
  return r;
}

template <class A>
RF_INLINE Pack<A> operator+(const Pack<A>& a, const Pack<A>& b) {
  Pack<A> r;
  RF_FOR_VECTORS(A) r.v[i] = a.v[i] + b.v[i];
  return r;
}

template <class A>
RF_INLINE Pack<A> operator-(const Pack<A>& a, const Pack<A>& b) {
  Pack<A> r;
  RF_FOR_VECTORS(A) r.v[i] = a.v[i] - b.v[i];
  return r;
}

template <class A>
RF_INLINE Pack<A> operator*(const Pack<A>& a, const Pack<A>& b) {
  Pack<A> r;
  RF_FOR_VECTORS(A) r.v[i] = a.v[i] * b.v[i];
  return r;
}

// a * b + c. Explicit, and contraction is off (-ffp-contract=off): the backward recomputes the
// forward's ReLU mask and must round as it did.
template <class A>
RF_INLINE Pack<A> fma(const Pack<A>& a, const Pack<A>& b, const Pack<A>& c) {
#if defined(__AVX512F__)
  Pack<A> r;
  RF_FOR_VECTORS(A) {
    if constexpr (sizeof(A) == 4) {
      r.v[i] = _mm512_fmadd_ps(a.v[i], b.v[i], c.v[i]);
    } else {
      r.v[i] = _mm512_fmadd_pd(a.v[i], b.v[i], c.v[i]);
    }
  }
  return r;
#elif defined(__FMA__)
  Pack<A> r;
  RF_FOR_VECTORS(A) {
    if constexpr (sizeof(A) == 4) {
      r.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
    } else {
      r.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
    }
  }
  return r;
#else
  return a * b + c;
#endif
}

// The same of single vectors of floats.
RF_INLINE Pack<float>::Vector fma_vector(Pack<float>::Vector a, Pack<float>::Vector b,
                                         Pack<float>::Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// max(a, 0) that hands NaN and -0 on, as torch.relu does.
template <class A>
RF_INLINE Pack<A> relu(const Pack<A>& a) {
  Pack<A> r;
  const typename Pack<A>::Vector zero{};
  RF_FOR_VECTORS(A) r.v[i] = a.v[i] < zero ? zero : a.v[i];
  return r;
}

// ---- masks: bit l belongs to lane l -------------------------------------------------------------

// Bits of the lanes with not (a <= threshold): NaN counts as above.
template <class A>
RF_INLINE uint16_t above(const Pack<A>& a, A threshold) {
  const Pack<A> t = broadcast(threshold);
  uint32_t bits = 0;
#if defined(__AVX512F__)
  RF_FOR_VECTORS(A) {
    if constexpr (sizeof(A) == 4) {
      bits = _mm512_cmp_ps_mask(a.v[i], t.v[i], _CMP_NLE_UQ);
    } else {
      bits |= uint32_t(_mm512_cmp_pd_mask(a.v[i], t.v[i], _CMP_NLE_UQ)) << (8 * i);
    }
  }
#elif defined(__AVX2__)
  RF_FOR_VECTORS(A) {
    if constexpr (sizeof(A) == 4) {
      bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v[i], t.v[i], _CMP_NLE_UQ))) << (8 * i);
    } else {
      bits |= uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(a.v[i], t.v[i], _CMP_NLE_UQ))) << (4 * i);
    }
  }
#else
  RF_FOR_VECTORS(A) {
    for (int l = 0; l < Pack<A>::kWidth; ++l) {
      bits |= uint32_t(!(a.v[i][l] <= t.v[i][l])) << (Pack<A>::kWidth * i + l);
    }
  }
#endif
  return uint16_t(bits);
}

// a where the lane's bit is set, else 0.
template <class A>
RF_INLINE Pack<A> select(uint16_t bits, const Pack<A>& a) {
  Pack<A> r;
#if defined(__AVX512F__)
  RF_FOR_VECTORS(A) {
    if constexpr (sizeof(A) == 4) {
      r.v[i] = _mm512_maskz_mov_ps(bits, a.v[i]);
    } else {
      r.v[i] = _mm512_maskz_mov_pd(__mmask8(bits >> (8 * i)), a.v[i]);
    }
  }
#else
  typedef decltype(a.v[0] < a.v[0]) Integers;
  using Int = decltype(Integers{}[0] + 0);
  RF_FOR_VECTORS(A) {
    Integers lane_bit{};
    for (int l = 0; l < Pack<A>::kWidth; ++l) lane_bit[l] = Int(1) << (Pack<A>::kWidth * i + l);
    const Integers kept = ((Integers{} + Int(bits)) & lane_bit) != 0;
    r.v[i] = (typename Pack<A>::Vector)((Integers)a.v[i] & kept);
  }
#endif
  return r;
}

RF_INLINE uint16_t lane_bits(int lo, int hi) {
  return uint16_t(((1u << hi) - 1u) & ~((1u << lo) - 1u));
}

// The lanes' sum in double, in a fixed order.
template <class A>
RF_INLINE double sum(const Pack<A>& a) {
  double lanes[kLanes];
  RF_FOR_VECTORS(A) {
    for (int l = 0; l < Pack<A>::kWidth; ++l) lanes[Pack<A>::kWidth * i + l] = double(a.v[i][l]);
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

}  // namespace resnet_fast::cpu::RF_ISA
