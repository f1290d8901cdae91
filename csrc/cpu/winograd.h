// SPDX-License-Identifier: BSD-3-Clause
// Winograd's minimal filtering (Lavin & Gray 2016) for 3x3 with stride 1, channels-last, float32:
// the transforms of tiles, shared by the convolution and by the gradient of its filter.
//
// Tiles of m x m outputs come from (m+2) x (m+2) inputs, m = 4 or 2. The points of m = 4 are 0,
// +-3/4, +-3/2 and infinity: exact in binary, and close together, so that less is lost by
// cancellation than with 0, +-1, +-2.
#pragma once

#include "conv_gemm.h"

namespace resnet_fast::cpu::RF_ISA {

// One-dimensional transforms of six inputs, to four outputs, and of four outputs' gradients (the
// transpose of the one before). kPoints: where the polynomials are evaluated, but for infinity.
struct Tile4 {
  static constexpr int kOut = 4, kIn = 6;
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;
  static constexpr double kPoints[] = {0, a, -a, b, -b};

  static RF_INLINE void input(const Pack<float> (&d)[6], Pack<float> (&t)[6]) {
    const auto even_a = fma(broadcast(-b2), d[2], d[4]), odd_a = fma(broadcast(-b2), d[1], d[3]);
    const auto even_b = fma(broadcast(-a2), d[2], d[4]), odd_b = fma(broadcast(-a2), d[1], d[3]);
    t[0] = fma(broadcast(a2 * b2), d[0], fma(broadcast(-(a2 + b2)), d[2], d[4]));
    t[1] = fma(broadcast(a), odd_a, even_a);
    t[2] = fma(broadcast(-a), odd_a, even_a);
    t[3] = fma(broadcast(b), odd_b, even_b);
    t[4] = fma(broadcast(-b), odd_b, even_b);
    t[5] = fma(broadcast(a2 * b2), d[1], fma(broadcast(-(a2 + b2)), d[3], d[5]));
  }
  static RF_INLINE void output(const Pack<float> (&m)[6], Pack<float> (&y)[4]) {
    const auto sum_a = m[1] + m[2], minus_a = m[1] - m[2];
    const auto sum_b = m[3] + m[4], minus_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = fma(broadcast(a), minus_a, broadcast(b) * minus_b);
    y[2] = fma(broadcast(a2), sum_a, broadcast(b2) * sum_b);
    y[3] = fma(broadcast(a * a2), minus_a, fma(broadcast(b * b2), minus_b, m[5]));
  }
  static RF_INLINE void gradient(const Pack<float> (&y)[4], Pack<float> (&m)[6]) {
    const auto even_a = fma(broadcast(a2), y[2], y[0]), even_b = fma(broadcast(b2), y[2], y[0]);
    const auto odd_a = fma(broadcast(a2), y[3], y[1]), odd_b = fma(broadcast(b2), y[3], y[1]);
    m[0] = y[0];
    m[1] = fma(broadcast(a), odd_a, even_a);
    m[2] = fma(broadcast(-a), odd_a, even_a);
    m[3] = fma(broadcast(b), odd_b, even_b);
    m[4] = fma(broadcast(-b), odd_b, even_b);
    m[5] = y[3];
  }
};

struct Tile2 {
  static constexpr int kOut = 2, kIn = 4;
  static constexpr double kPoints[] = {0, 1, -1};

  static RF_INLINE void input(const Pack<float> (&d)[4], Pack<float> (&t)[4]) {
    t[0] = d[2] - d[0];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  static RF_INLINE void output(const Pack<float> (&m)[4], Pack<float> (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
  static RF_INLINE void gradient(const Pack<float> (&y)[2], Pack<float> (&m)[4]) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = y[1];
  }
};

// The filter's transform (kIn, 3): its values at the points, scaled by the interpolation's
// denominators, so that the input's transform needs none.
template <class T>
struct FilterTransform {
  double at[T::kIn][3];

  constexpr FilterTransform() : at{} {
    for (int i = 0; i + 1 < T::kIn; ++i) {
      const double p = T::kPoints[i];
      double denominator = 1;
      for (int j = 0; j + 1 < T::kIn; ++j) {
        if (j != i) denominator *= p - T::kPoints[j];
      }
      for (int k = 0; k < 3; ++k) at[i][k] = (k == 0 ? 1 : k == 1 ? p : p * p) / denominator;
    }
    at[T::kIn - 1][2] = 1;
  }
};

template <class T>
constexpr FilterTransform<T> kFilterTransform{};

// Where the tiles of a call lie.
struct Tiling {
  int64_t down, across, count;
  Tiling(const ConvParams& p, int m)
      : down(ceil_div(p.out_h, m)), across(ceil_div(p.out_w, m)), count(p.n * down * across) {}
  struct Place {
    int64_t n, i, j;
  };
  Place place(int64_t tile) const {
    return {tile / (across * down), tile / across % down, tile % across};
  }
};

// Transformed inputs and products of the tiles [first, last).
struct Block {
  int64_t first, last;
  float* inputs;                         // [point][tile][C_in, padded]
  float* products;                       // [point][tile][C_out]
  int64_t input_stride, product_stride;  // of a point: no power of two, see conv_gemm.h
  int64_t tiles() const { return last - first; }
};

inline int64_t padded_stride(int64_t floats) { return ceil_div(floats, 1024) * 1024 + 5 * kLanes; }

// An input tile: in the picture, or copied with the zeros around it where it crosses the edge.
template <class T>
class InputTile {
 public:
  InputTile(const ConvParams& p, const float* picture, int64_t top, int64_t left)
      : p_(p),
        corner_(picture + (top * p.in_w + left) * p.in_c),
        top_(top),
        left_(left),
        inside_(top >= 0 && left >= 0 && top + T::kIn <= p.in_h && left + T::kIn <= p.in_w) {}

  // The transform of 16 channels, each point `stride` after the one before.
  void transform(int64_t c, float* out, int64_t stride) const {
    if (inside_) {
      return transform(corner_ + c, p_.in_w * p_.in_c, p_.in_c, out, stride);
    }
    alignas(64) float copy[T::kIn * T::kIn * kLanes];
    for (int r = 0; r < T::kIn; ++r) {
      for (int s = 0; s < T::kIn; ++s) {
        const bool there =
            top_ + r >= 0 && top_ + r < p_.in_h && left_ + s >= 0 && left_ + s < p_.in_w;
        store(copy + (r * T::kIn + s) * kLanes,
              there ? load(corner_ + (r * p_.in_w + s) * p_.in_c + c) : broadcast(0.0f));
      }
    }
    transform(copy, T::kIn * kLanes, kLanes, out, stride);
  }

 private:
  static void transform(const float* from, int64_t line, int64_t pixel, float* out,
                        int64_t stride) {
    Pack<float> columns[T::kIn][T::kIn];
#pragma GCC unroll 6
    for (int s = 0; s < T::kIn; ++s) {
      Pack<float> in[T::kIn], t[T::kIn];
#pragma GCC unroll 6
      for (int r = 0; r < T::kIn; ++r) in[r] = load(from + r * line + s * pixel);
      T::input(in, t);
#pragma GCC unroll 6
      for (int r = 0; r < T::kIn; ++r) columns[r][s] = t[r];
    }
#pragma GCC unroll 6
    for (int r = 0; r < T::kIn; ++r) {
      Pack<float> t[T::kIn];
      T::input(columns[r], t);
#pragma GCC unroll 6
      for (int s = 0; s < T::kIn; ++s) store(out + (r * T::kIn + s) * stride, t[s]);
    }
  }

  const ConvParams& p_;
  const float* corner_;
  int64_t top_, left_;
  bool inside_;
};

template <class T>
InputTile<T> input_tile(const ConvParams& p, const Tiling& tiling, int64_t tile) {
  const Tiling::Place at = tiling.place(tile);
  return {p, p.x + at.n * p.in_h * p.in_w * p.in_c, at.i * T::kOut - p.pad_h,
          at.j * T::kOut - p.pad_w};
}

template <class T>
void transform_inputs(const ConvParams& p, const Tiling& tiling, const Block& block,
                      const Parallel& parallel) {
  const int64_t row_stride = padded_row(p.in_c);
  parallel_for(parallel, block.tiles(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const InputTile<T> tile = input_tile<T>(p, tiling, block.first + t);
      for (int64_t c = 0; c < p.in_c; c += kLanes) {
        tile.transform(c, block.inputs + t * row_stride + c, block.input_stride);
      }
    }
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
