// SPDX-License-Identifier: BSD-3-Clause
// 3x3 convolution with stride 1 by Winograd's minimal filtering (Lavin & Gray 2016), channels-last,
// float32: tiles of m x m outputs from (m+2) x (m+2) inputs, m = 4 or 2.
//
// Multiplications: (m+2)^2 / m^2 a pixel instead of 9, so 4 times (m = 4) or 2.25 times fewer,
// where tiles fill the picture. Bytes: x once with the tiles' overlap, w (m+2)^2 / 9 of the
// filter's size, y and residual once; transformed tiles are written and read once, in blocks that
// stay in the caches.
#include "table.h"
#include "winograd.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

struct ProductOut {
  float* products;
  int64_t channels;
  static constexpr bool far = true;

  RF_INLINE void fetch(int64_t row, int64_t column) const {
    __builtin_prefetch(products + row * channels + column, 1);
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
    const Ahead then = next_weights(p, begin, T::kIn * T::kIn);
    for (int64_t point = begin; point < end; ++point) {
      float* out = block.products + point * block.product_stride;
      gemm(Rows{block.inputs + point * block.input_stride, padded_row(p.in_c), p.in_c},
           {0, block.tiles()}, p.weight + point * weights, {0, panels}, p.out_c,
           p.weight + end * weights, then, ProductOut{out, p.out_c});
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
constexpr int64_t kOwnFloats = 224 * 1024, kSharedFloats = 3072 * 1024;
constexpr int64_t kFewTiles = 56;
// Weights that no thread can keep to itself: each block reads them from the last cache or memory.
constexpr int64_t kManyWeights = 2048 * 1024;

template <class T>
void winograd(const ConvParams& p, const Parallel& parallel) {
  const Tiling tiling(p, T::kOut);
  constexpr int64_t kPoints = T::kIn * T::kIn;
  const int64_t in_c = padded_row(p.in_c), per_tile = kPoints * (in_c + p.out_c);
  // Every product of a block reads all weights: a block has tiles enough to make that cheap.
  const int64_t own = maximum(kOwnFloats / per_tile, kFewTiles);
  const bool shared =
      tiling.count < parallel.threads * own || kPoints * p.in_c * p.out_c > kManyWeights;
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
