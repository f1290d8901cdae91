// SPDX-License-Identifier: BSD-3-Clause
// The gradient of the filters of winograd.h's convolution, which is the convolution's transpose.
//
// With V the transformed inputs and D the transformed gradients of the outputs (A dY A^T), it is
// G^T (sum over tiles of D V) G for every pair of channels: as few multiplications as the forward
// has. Blocks of tiles are summed in their order, and points are shared out among threads, so the
// bits do not depend on how many there are.
#include "table.h"
#include "winograd.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// One product of a point: out (rows, columns) = or += a^T b.
struct Outer {
  const float *a, *b;
  int64_t a_stride, b_stride, depth;
  float* out;
  int64_t out_stride;
  bool add;
};

template <int Height, int Packs>
void outer_tile(const Outer& o, int64_t row, int64_t column) {
  Sums<Height, Packs> acc;
  const float *a = o.a + row, *b = o.b + column;
  for (int64_t k = 0; k < o.depth; ++k, a += o.a_stride, b += o.b_stride) {
    acc.add_products(b, [&](int i) RF_LAMBDA { return a[i]; });
  }
  float* out = o.out + row * o.out_stride + column;
#pragma GCC unroll 6
  for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Packs; ++j) {
      float* to = out + i * o.out_stride + j * kLanes;
      store(to, o.add ? load(to) + acc.pack(i, j) : acc.pack(i, j));
    }
  }
}

template <int Height, int Packs>
RF_INLINE void outer_tile_of(int height, const Outer& o, int64_t row, int64_t column) {
  if constexpr (Height > 1) {
    if (height < Height) return outer_tile_of<Height - 1, Packs>(height, o, row, column);
  }
  outer_tile<Height, Packs>(o, row, column);
}

void outer_product(const Outer& o, int64_t rows, int64_t columns) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for_packs(columns, [&](auto packs, int64_t c) {
    for (int64_t t = 0; t < tiles; ++t) {
      const Range at = Range{0, rows}.part(t, tiles);
      outer_tile_of<kTileRows, packs.value>(int(at.size()), o, at.first, c);
    }
  });
}

// The transform of a tile of gradients, 16 channels; zeros where it hangs over the edge.
template <class T>
void transform_gradient(const ConvParams& p, const Tiling::Place& at, int64_t c, float* out,
                        int64_t stride) {
  const int64_t top = at.i * T::kOut, left = at.j * T::kOut;
  const float* corner = p.y + ((at.n * p.out_h + top) * p.out_w + left) * p.out_c + c;
  Pack<float> columns[T::kIn][T::kOut];
#pragma GCC unroll 4
  for (int s = 0; s < T::kOut; ++s) {
    Pack<float> in[T::kOut], t[T::kIn];
#pragma GCC unroll 4
    for (int r = 0; r < T::kOut; ++r) {
      const bool there = top + r < p.out_h && left + s < p.out_w;
      in[r] = there ? load(corner + (r * p.out_w + s) * p.out_c) : broadcast(0.0f);
    }
    T::gradient(in, t);
#pragma GCC unroll 6
    for (int r = 0; r < T::kIn; ++r) columns[r][s] = t[r];
  }
#pragma GCC unroll 6
  for (int r = 0; r < T::kIn; ++r) {
    Pack<float> t[T::kIn];
    T::gradient(columns[r], t);
#pragma GCC unroll 6
    for (int s = 0; s < T::kIn; ++s) store(out + (r * T::kIn + s) * stride, t[s]);
  }
}

template <class T>
void transform_gradients(const ConvParams& p, const Tiling& tiling, const Block& block,
                         const Parallel& parallel) {
  const int64_t row_stride = padded_row(p.out_c);
  parallel_for(parallel, block.tiles(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Tiling::Place at = tiling.place(block.first + t);
      for (int64_t c = 0; c < p.out_c; c += kLanes) {
        transform_gradient<T>(p, at, c, block.products + t * row_stride + c, block.product_stride);
      }
    }
  });
}

// Values of transformed tiles at once, so that they stay in the caches, and tiles summed in a row:
// sums of few terms are added up, which rounds less than one long sum.
constexpr int64_t kBlockFloats = 384 * 1024, kRun = 128;

// sums (point, C_out, C_in) = or += of the block's tiles.
template <class T>
void multiply_tiles(const ConvParams& p, const Block& block, float* sums,
                    const Parallel& parallel) {
  const int64_t a_stride = padded_row(p.out_c), b_stride = padded_row(p.in_c);
  const int64_t panels = ceil_div(p.in_c, kPanel);
  parallel_for(parallel, T::kIn * T::kIn * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t point = i / panels, c = i % panels * kPanel;
      for (int64_t k = 0; k < block.tiles(); k += kRun) {
        const Outer o{block.products + point * block.product_stride + k * a_stride,
                      block.inputs + point * block.input_stride + c + k * b_stride,
                      a_stride,
                      b_stride,
                      minimum(kRun, block.tiles() - k),
                      sums + point * p.out_c * p.in_c + c,
                      p.in_c,
                      block.first + k > 0};
        outer_product(o, p.out_c, minimum(kPanel, p.in_c - c));
      }
    }
  });
}

// weight (C_out, 3, 3, C_in) = G^T sums G.
template <class T>
void untransform_filters(const ConvParams& p, const float* sums, float* weight,
                         const Parallel& parallel) {
  constexpr auto& g = kFilterTransform<T>.at;
  const int64_t stride = p.out_c * p.in_c;
  parallel_for(parallel, p.out_c, 4, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t c = 0; c < p.in_c; c += kLanes) {
        Pack<float> rows[3][T::kIn];
        for (int s = 0; s < T::kIn; ++s) {
          for (int r = 0; r < 3; ++r) rows[r][s] = broadcast(0.0f);
          for (int i = 0; i < T::kIn; ++i) {
            const Pack<float> m = load(sums + (i * T::kIn + s) * stride + o * p.in_c + c);
            for (int r = 0; r < 3; ++r) rows[r][s] = fma(broadcast(float(g[i][r])), m, rows[r][s]);
          }
        }
        for (int r = 0; r < 3; ++r) {
          for (int s = 0; s < 3; ++s) {
            Pack<float> tap = broadcast(0.0f);
            for (int i = 0; i < T::kIn; ++i) {
              tap = fma(broadcast(float(g[i][s])), rows[r][i], tap);
            }
            store(weight + ((o * 3 + r) * 3 + s) * p.in_c + c, tap);
          }
        }
      }
    }
  });
}

template <class T>
void gradient(const ConvParams& p, float* weight, const Parallel& parallel) {
  const Tiling tiling(p, T::kOut);
  constexpr int64_t kPoints = T::kIn * T::kIn;
  const int64_t in_c = padded_row(p.in_c), out_c = padded_row(p.out_c);
  const int64_t at_most = maximum(kBlockFloats / (kPoints * (in_c + out_c)), 64);
  const int64_t blocks = ceil_div(tiling.count, at_most), tiles = ceil_div(tiling.count, blocks);
  const int64_t input_stride = padded_stride(tiles * in_c);
  const int64_t product_stride = padded_stride(tiles * out_c);
  const Scratch<float> memory(kPoints * (input_stride + product_stride));
  const Scratch<float> sums(kPoints * p.out_c * p.in_c);
  for (int64_t k = 0; k < blocks; ++k) {
    const Block block{k * tiling.count / blocks,
                      (k + 1) * tiling.count / blocks,
                      memory.get(),
                      memory.get() + kPoints * input_stride,
                      input_stride,
                      product_stride};
    transform_inputs<T>(p, tiling, block, parallel);
    transform_gradients<T>(p, tiling, block, parallel);
    multiply_tiles<T>(p, block, sums.get(), parallel);
  }
  untransform_filters<T>(p, sums.get(), weight, parallel);
}

}  // namespace

void conv_winograd_weight(const ConvParams& p, float* weight, int tile, const Parallel& parallel) {
  if (tile == 4) {
    gradient<Tile4>(p, weight, parallel);
  } else {
    gradient<Tile2>(p, weight, parallel);
  }
}

}  // namespace resnet_fast::cpu::RF_ISA
