// SPDX-License-Identifier: BSD-3-Clause
// Max-pooling of a ResNet's stem, 3x3 with stride 2 and padding 1, channels-last, keeping one byte
// for each output: which of the nine pixels it is (3 * line + column of its window).
//
// Bytes moved for inputs of b bytes, of which the outputs are a quarter: forward 1.25 b + 1 / 4,
// backward the same: each tensor once. The backward gathers, so that dx is written once and is
// never filled with zeros; the up to four windows of a pixel are added in PyTorch's order.
#include "loops.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

constexpr int kWindow = 3, kStride = 2, kPadding = 1;

// The larger of both lane by lane, the first of equals, and the later of NaNs as PyTorch has it;
// place: where it was found. (As values of the lanes' own width, so that one comparison serves.)
template <class A>
RF_INLINE void take_larger(const Pack<A>& value, const Pack<A>& here, Pack<A>& most,
                           Pack<A>& place) {
  RF_FOR_VECTORS(A) {
    const auto take = (value.v[i] > most.v[i]) | (value.v[i] != value.v[i]);
    most.v[i] = take ? value.v[i] : most.v[i];
    place.v[i] = take ? here.v[i] : place.v[i];
  }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

template <class A>
RF_INLINE Bytes as_bytes(const Pack<A>& places) {
  typedef A Lanes __attribute__((vector_size(kLanes * sizeof(A))));
  typedef int32_t Integers __attribute__((vector_size(64)));
  Lanes lanes;
  std::memcpy(&lanes, &places, sizeof lanes);
  return __builtin_convertvector(__builtin_convertvector(lanes, Integers), Bytes);
}

// Bits of the lanes whose byte is `value`.
RF_INLINE uint16_t equal_bytes(const uint8_t* p, uint8_t value) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return uint16_t(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(char(value)))));
#else
  uint16_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= uint16_t(p[l] == value) << l;
  return bits;
#endif
}

// The windows that pixel i of a line or column lies in, [first, last).
struct Windows {
  int64_t first, last;
  RF_INLINE Windows(int64_t i, int64_t outputs)
      : first((i + kPadding - kWindow + kStride) / kStride),
        last(minimum((i + kPadding) / kStride + 1, outputs)) {}
};

template <class T>
struct Forward {
  using A = Accumulate<T>;
  const MaxPoolParams& p;

  // Channels [c, c + count) of one output, count at most sixteen.
  template <bool kWhole>
  RF_INLINE void pixel(int64_t n, int64_t i, int64_t j, int64_t c, int count) const {
    const int64_t top = i * kStride - kPadding, left = j * kStride - kPadding;
    Pack<A> most = broadcast(A(-__builtin_inff())), place = broadcast(A(0));
    bool none = true;
    for (int64_t h = maximum(top, 0); h < minimum(top + kWindow, p.height); ++h) {
      for (int64_t w = maximum(left, 0); w < minimum(left + kWindow, p.width); ++w) {
        const T* from =
            static_cast<const T*>(p.x) + ((n * p.height + h) * p.width + w) * p.channels;
        const Pack<A> value = kWhole ? load(from + c) : load_part(from + c, 0, count);
        const Pack<A> here = broadcast(A((h - top) * kWindow + w - left));
        if (none) place = here;  // also where all are -inf
        none = false;
        take_larger(value, here, most, place);
      }
    }
    const int64_t at = ((n * p.out_height + i) * p.out_width + j) * p.channels + c;
    T* const y = static_cast<T*>(p.y);
    const Bytes bytes = as_bytes(place);
    if (kWhole) {
      store(y + at, most);
    } else {
      store_part(y + at, most, 0, count);
    }
    if (p.place) std::memcpy(p.place + at, &bytes, kWhole ? kLanes : count);
  }
};

template <class T>
struct Backward {
  using A = Accumulate<T>;
  const MaxPoolGradParams& p;
  bool streamed;

  template <bool kWhole>
  RF_INLINE void pixel(int64_t n, int64_t h, int64_t w, int64_t c, int count) const {
    Pack<A> sum = broadcast(A(0));
    const Windows lines(h, p.out_height), columns(w, p.out_width);
    for (int64_t i = lines.first; i < lines.last; ++i) {
      for (int64_t j = columns.first; j < columns.last; ++j) {
        const int64_t at = ((n * p.out_height + i) * p.out_width + j) * p.channels + c;
        const uint8_t here =
            uint8_t((h - i * kStride + kPadding) * kWindow + w - j * kStride + kPadding);
        const T* const grad = static_cast<const T*>(p.grad) + at;
        if (kWhole) {
          sum = sum + select(equal_bytes(p.place + at, here), load(grad));
        } else {
          uint8_t places[kLanes] = {};
          std::memcpy(places, p.place + at, count);
          sum = sum + select(equal_bytes(places, here), load_part(grad, 0, count));
        }
      }
    }
    T* const dx = static_cast<T*>(p.dx) + ((n * p.height + h) * p.width + w) * p.channels + c;
    if (kWhole) {
      put(dx, sum, streamed);
    } else {
      store_part(dx, sum, 0, count);
    }
  }
};

// body.pixel<whole>(image, line, column, channel, channels) for all of the pictures that it writes.
template <class Body>
void for_pixels(int64_t images, int64_t height, int64_t width, int64_t channels,
                const Parallel& parallel, const Body& body) {
  const int64_t whole = channels / kLanes * kLanes;
  const auto line = [&](int64_t n, int64_t i) {
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = 0; c < whole; c += kLanes) body.template pixel<true>(n, i, j, c, kLanes);
      if (whole < channels) body.template pixel<false>(n, i, j, whole, int(channels - whole));
    }
  };
  parallel_for(parallel, images * height, ceil_div(kGrain, maximum(width * channels, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t l = begin; l < end; ++l) line(l / height, l % height);
                 finish_streaming();
               });
}

}  // namespace

void max_pool(const MaxPoolParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    for_pixels(p.images, p.out_height, p.out_width, p.channels, parallel,
               Forward<decltype(zero)>{p});
  });
}

void max_pool_grad(const MaxPoolGradParams& p, const Parallel& parallel) {
  // Only whole packs of a tensor without odd ones lie on a multiple of the vector's size.
  const bool streamed = p.stream && p.channels % kLanes == 0;
  for_dtype(p.dtype, [&](auto zero) {
    for_pixels(p.images, p.height, p.width, p.channels, parallel,
               Backward<decltype(zero)>{p, streamed});
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
