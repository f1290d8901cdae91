// SPDX-License-Identifier: BSD-3-Clause
// The matrix product inside the convolutions: rows of pixels times a panel of 32 output channels.
//
// A lies in chunks of 64 columns, [chunk][row][64], so that the rows of a tile are a fixed 256
// bytes apart, whatever K is: no power-of-two stride that would evict itself from the first cache.
// B lies in panels of 32 columns, [k][32], zero-filled past the last channel.
#pragma once

#include "loops.h"

namespace resnet_fast::cpu::RF_ISA {

constexpr int kChunk = 64;
constexpr int kPanel = 32;
constexpr int kPrefetch = 12;  // rows of a panel ahead

// Rows and packs of a tile: its accumulators fill the registers but for those of B and a broadcast.
#if defined(__AVX512F__)
constexpr int kTileRows = 14, kTilePacks = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTilePacks = 1;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePacks = 1;
#else
constexpr int kTileRows = 2, kTilePacks = 1;
#endif

// acc += A[0..Rows) * B, over K.
template <int Rows, int Packs>
RF_INLINE void multiply(const float* a, int64_t chunk_stride, const float* b, int64_t depth,
                        Pack<float> (&acc)[Rows][Packs]) {
  for (; depth > 0; depth -= kChunk, a += chunk_stride) {
    const int64_t length = minimum(depth, kChunk);
    for (int64_t k = 0; k < length; ++k, b += kPanel) {
      Pack<float> columns[Packs];
      // Weights come from memory or the last cache, in order; past the last panel this does nothing.
#pragma GCC unroll 2
      for (int j = 0; j < Packs; ++j) {
        __builtin_prefetch(b + kPrefetch * kPanel + j * kLanes);
      }
#pragma GCC unroll 2
      for (int j = 0; j < Packs; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < Rows; ++i) {
        const Pack<float> value = broadcast(a[i * kChunk + k]);
#pragma GCC unroll 2
        for (int j = 0; j < Packs; ++j) acc[i][j] = fma(value, columns[j], acc[i][j]);
      }
    }
  }
}

template <int Rows, int Packs, class Out>
void tile(const float* a, int64_t chunk_stride, const float* b, int64_t depth, int64_t row,
          int64_t column, const Out& out) {
  Pack<float> acc[Rows][Packs];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Packs; ++j) acc[i][j] = broadcast(0.0f);
  }
  multiply<Rows, Packs>(a, chunk_stride, b, depth, acc);
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Packs; ++j) out(row + i, column + j * kLanes, acc[i][j]);
  }
}

// tile<> of `rows` rows, 1 to Rows.
template <int Rows, int Packs, class Out>
RF_INLINE void tile_of(int rows, const float* a, int64_t chunk_stride, const float* b,
                       int64_t depth, int64_t row, int64_t column, const Out& out) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return tile_of<Rows - 1, Packs>(rows, a, chunk_stride, b, depth, row, column, out);
    }
  }
  tile<Rows, Packs>(a, chunk_stride, b, depth, row, column, out);
}

// out(row, column, pack) for every row and every 16 columns of A (rows, depth) times the panels
// [first, last) of B; columns: how many there are, a multiple of 16.
template <class Out>
void gemm(const float* a, int64_t rows, int64_t chunk_stride, const float* b, int64_t depth,
          int64_t first, int64_t last, int64_t columns, const Out& out) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t p = first; p < last; ++p) {
    const float* panel = b + p * depth * kPanel;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * rows / tiles;
      const int height = int((t + 1) * rows / tiles - row);
      for (int64_t c = p * kPanel; c < minimum((p + 1) * kPanel, columns);
           c += kTilePacks * kLanes) {
        const float* part = panel + c - p * kPanel;
        if (kTilePacks > 1 && c + kLanes >= columns) {
          tile_of<kTileRows, 1>(height, a + row * kChunk, chunk_stride, part, depth, row, c, out);
        } else {
          tile_of<kTileRows, kTilePacks>(height, a + row * kChunk, chunk_stride, part, depth, row,
                                         c, out);
        }
      }
    }
  }
}

// What happens to a finished sum of products: + bias, + residual, ReLU, out.
struct ConvEpilogue {
  const float* bias;      // of every output channel
  const float* residual;  // or null; where y lies, too
  float* y;
  bool relu;

  RF_INLINE void operator()(int64_t offset, int64_t channel, const Pack<float>& sum) const {
    Pack<float> v = sum + load(bias + channel);
    if (residual) v = v + load(residual + offset);
    store(y + offset, relu ? resnet_fast::cpu::RF_ISA::relu(v) : v);
  }
};

}  // namespace resnet_fast::cpu::RF_ISA
