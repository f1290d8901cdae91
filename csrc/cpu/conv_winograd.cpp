// SPDX-License-Identifier: BSD-3-Clause
// 3x3 convolution with stride 1 by Winograd's minimal filtering (Lavin & Gray 2016), channels-last,
// float32: tiles of m x m outputs from (m+2) x (m+2) inputs, m = 4 or 2.
//
// Multiplications: (m+2)^2 / m^2 a pixel instead of 9, so 4 times (m = 4) or 2.25 times fewer,
// where tiles fill the picture. The points of m = 4 are 0, +-3/4, +-3/2 and infinity: exact in
// binary, and close together, so that less is lost by cancellation than with 0, +-1, +-2. Bytes: x
// once with the tiles' overlap, w (m+2)^2 / 9 of the filter's size, y and residual once;
// transformed tiles are written and read once, in blocks that stay in the caches.
#include "conv_gemm.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// One-dimensional transforms of six inputs and to four outputs.
struct Tile4 {
  static constexpr int kOut = 4, kIn = 6;
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;

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
};

// Points 0, 1, -1, infinity.
struct Tile2 {
  static constexpr int kOut = 2, kIn = 4;

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
};

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

int64_t padded_stride(int64_t floats) { return ceil_div(floats, 1024) * 1024 + 5 * kLanes; }

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

struct ProductOut {
  float* products;
  int64_t channels;

  RF_INLINE void fetch(int64_t row, int64_t column) const {
    fetch_panel(products + row * channels + column);
  }
  RF_INLINE void operator()(int64_t row, int64_t column, const Pack<float>& sum) const {
    store(products + row * channels + column, sum);
  }
};

// The products of all points, each a matrix product of tiles and channels.
template <class T>
void multiply_points(const ConvParams& p, const Block& block, const Parallel& parallel) {
  const int64_t panels = ceil_div(p.out_c, kPanel), weights = panels * kPanel * p.in_c;
  parallel_for(parallel, T::kIn * T::kIn, 1, [&](int64_t begin, int64_t end) {
    for (int64_t point = begin; point < end; ++point) {
      float* out = block.products + point * block.product_stride;
      gemm(Rows{block.inputs + point * block.input_stride, padded_row(p.in_c), p.in_c},
           block.tiles(), p.weight + point * weights, p.out_c, ProductOut{out, p.out_c});
    }
  });
}

template <class T>
RF_INLINE void untransform_tile(const float* products, int64_t stride,
                                Pack<float> (&y)[T::kOut][T::kOut]) {
  Pack<float> rows[T::kIn][T::kOut];
#pragma GCC unroll 6
  for (int r = 0; r < T::kIn; ++r) {
    Pack<float> m[T::kIn];
#pragma GCC unroll 6
    for (int s = 0; s < T::kIn; ++s) m[s] = load(products + (r * T::kIn + s) * stride);
    T::output(m, rows[r]);
  }
#pragma GCC unroll 4
  for (int s = 0; s < T::kOut; ++s) {
    Pack<float> m[T::kIn], out[T::kOut];
#pragma GCC unroll 6
    for (int r = 0; r < T::kIn; ++r) m[r] = rows[r][s];
    T::output(m, out);
#pragma GCC unroll 4
    for (int r = 0; r < T::kOut; ++r) y[r][s] = out[r];
  }
}

template <class T>
void transform_outputs(const ConvParams& p, const Tiling& tiling, const Block& block,
                       const Parallel& parallel) {
  const ConvEpilogue epilogue{p.bias, p.residual, p.y, p.relu};
  parallel_for(parallel, block.tiles(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Tiling::Place at = tiling.place(block.first + t);
      const int64_t top = at.i * T::kOut, left = at.j * T::kOut;
      const int64_t height = minimum(T::kOut, p.out_h - top);
      const int64_t width = minimum(T::kOut, p.out_w - left);
      const int64_t corner = ((at.n * p.out_h + top) * p.out_w + left) * p.out_c;
      for (int64_t c = 0; c < p.out_c; c += kLanes) {
        Pack<float> y[T::kOut][T::kOut];
        untransform_tile<T>(block.products + t * p.out_c + c, block.product_stride, y);
        for (int64_t r = 0; r < height; ++r) {
          for (int64_t s = 0; s < width; ++s) {
            epilogue(corner + (r * p.out_w + s) * p.out_c + c, c, y[r][s]);
          }
        }
      }
    }
  });
}

// Bytes that the transformed tiles of a block may take: of a core's second cache where each thread
// has its own block; of the last one where they share the block.
constexpr int64_t kOwnFloats = 224 * 1024, kSharedFloats = 2048 * 1024;
constexpr int64_t kFewTiles = 56;

template <class T>
void winograd(const ConvParams& p, const Parallel& parallel) {
  const Tiling tiling(p, T::kOut);
  constexpr int64_t kPoints = T::kIn * T::kIn;
  const int64_t in_c = padded_row(p.in_c), per_tile = kPoints * (in_c + p.out_c);
  // Every product of a block reads all weights: a block has tiles enough to make that cheap.
  const int64_t own = maximum(kOwnFloats / per_tile, kFewTiles);
  const bool shared = tiling.count < parallel.threads * own;
  const int64_t at_most = shared ? maximum(kSharedFloats / per_tile, kFewTiles) : own;
  int64_t blocks = ceil_div(tiling.count, at_most);
  if (!shared) blocks = ceil_div(blocks, parallel.threads) * parallel.threads;
  const int64_t tiles = ceil_div(tiling.count, blocks);
  const int64_t input_stride = padded_stride(tiles * in_c);
  const int64_t product_stride = padded_stride(tiles * p.out_c);
  const Parallel alone = serial();
  const auto run = [&](int64_t begin, int64_t end, const Parallel& inner) {
    const Scratch<float> memory(kPoints * (input_stride + product_stride));
    for (int64_t k = begin; k < end; ++k) {
      const Block block{k * tiling.count / blocks,
                        (k + 1) * tiling.count / blocks,
                        memory.get(),
                        memory.get() + kPoints * input_stride,
                        input_stride,
                        product_stride};
      transform_inputs<T>(p, tiling, block, inner);
      multiply_points<T>(p, block, inner);
      transform_outputs<T>(p, tiling, block, inner);
    }
  };
  if (shared) {
    run(0, blocks, parallel);
  } else {
    parallel_for(parallel, blocks, 1, [&](int64_t begin, int64_t end) { run(begin, end, alone); });
  }
}

}  // namespace

void conv_winograd(const ConvParams& p, int tile, const Parallel& parallel) {
  if (tile == 4) {
    winograd<Tile4>(p, parallel);
  } else {
    winograd<Tile2>(p, parallel);
  }
}

}  // namespace resnet_fast::cpu::RF_ISA
