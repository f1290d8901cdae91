// SPDX-License-Identifier: BSD-3-Clause
// The matrix product inside the convolutions: rows of pixels times a panel of 32 output channels.
//
// A's rows lie a fixed stride apart; a stride that is a large power of two would make the rows of a
// tile evict each other from the first cache, so rows written for it are padded (padded_row).
// B lies in panels of 32 columns, [k][32], zero-filled past the last channel.
#pragma once

#include "loops.h"

namespace resnet_fast::cpu::RF_ISA {

constexpr int kPanel = 32;
constexpr int kPrefetch = 24;  // rows of a panel ahead

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

// A row of `segments` runs of `depth` values; the runs of a row lie segment_stride apart.
struct Rows {
  const float* first;
  int64_t row_stride;
  int64_t depth;
  int64_t segments = 1, segment_stride = 0;
};

// The stride for rows of n values that are written for the product alone.
RF_INLINE int64_t padded_row(int64_t n) { return ceil_div(n, kLanes) * kLanes + kLanes; }

// Three rows to a pointer: addresses p, p + stride and p + 2 stride need no register of their own.
template <int Height>
struct RowPointers {
  static constexpr int kPointers = (Height + 2) / 3;
  const char* at[kPointers];
  int64_t stride;  // in bytes

  RF_INLINE RowPointers(const float* a, int64_t row_stride) : stride(row_stride * 4) {
    for (int i = 0; i < kPointers; ++i) at[i] = reinterpret_cast<const char*>(a) + 3 * i * stride;
  }
  RF_INLINE float row(int i, int k) const {
    float value;
    std::memcpy(&value, at[i / 3] + i % 3 * stride + k * sizeof(float), sizeof value);
    return value;
  }
  RF_INLINE void advance(int k) {
#pragma GCC unroll 5
    for (int i = 0; i < kPointers; ++i) {
      at[i] += k * sizeof(float);
      // Keeps the compiler from making a pointer of every row and running out of registers.
      asm("" : "+r"(at[i]));
    }
  }
};

// Both lines of a panel's row, to be written.
RF_INLINE void fetch_panel(const float* p) {
#pragma GCC unroll 2
  for (int j = 0; j < kPanel; j += kLanes) __builtin_prefetch(p + j, 1);
}

// acc += A[0..Height) * B, over Steps values of each row.
template <int Steps, int Height, int Packs>
RF_INLINE void multiply_steps(RowPointers<Height>& rows, const float*& b,
                              Pack<float> (&acc)[Height][Packs]) {
#pragma GCC unroll 4
  for (int k = 0; k < Steps; ++k) {
    Pack<float> columns[Packs];
    // Weights come from memory or the last cache, in order; past the last panel this does nothing.
#pragma GCC unroll 2
    for (int j = 0; j < Packs; ++j) {
      __builtin_prefetch(b + (k + kPrefetch) * kPanel + j * kLanes);
      columns[j] = load(b + k * kPanel + j * kLanes);
    }
#pragma GCC unroll 14
    for (int i = 0; i < Height; ++i) {
      const Pack<float> value = broadcast(rows.row(i, k));
#pragma GCC unroll 2
      for (int j = 0; j < Packs; ++j) acc[i][j] = fma(value, columns[j], acc[i][j]);
    }
  }
  b += Steps * kPanel;
  rows.advance(Steps);
}

// The same over one run of `depth` values.
template <int Height, int Packs>
RF_INLINE void multiply(const float* a, int64_t stride, const float* b, int64_t depth,
                        Pack<float> (&acc)[Height][Packs]) {
  RowPointers<Height> rows(a, stride);
  for (; depth >= 4; depth -= 4) multiply_steps<4>(rows, b, acc);
  for (; depth > 0; --depth) multiply_steps<1>(rows, b, acc);
}

template <int Height, int Packs, class Out>
void tile(const Rows& a, int64_t row, const float* b, int64_t column, const Out& out) {
  Pack<float> acc[Height][Packs];
#pragma GCC unroll 14
  for (int i = 0; i < Height; ++i) {
    out.fetch(row + i, column);
#pragma GCC unroll 2
    for (int j = 0; j < Packs; ++j) acc[i][j] = broadcast(0.0f);
  }
  const float* from = a.first + row * a.row_stride;
  for (int64_t s = 0; s < a.segments; ++s) {
    multiply(from, a.row_stride, b, a.depth, acc);
    from += a.segment_stride;
    b += a.depth * kPanel;
  }
#pragma GCC unroll 14
  for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Packs; ++j) out(row + i, column + j * kLanes, acc[i][j]);
  }
}

// tile<> of `height` rows, 1 to Height.
template <int Height, int Packs, class Out>
RF_INLINE void tile_of(int height, const Rows& a, int64_t row, const float* b, int64_t column,
                       const Out& out) {
  if constexpr (Height > 1) {
    if (height < Height) {
      return tile_of<Height - 1, Packs>(height, a, row, b, column, out);
    }
  }
  tile<Height, Packs>(a, row, b, column, out);
}

// The first `rows` of A times B, of `columns` columns, a multiple of 16: out.fetch(row, column)
// before a tile's row is computed, so that its lines are there when out(row, column, pack) takes
// every 16 columns of it.
template <class Out>
void gemm(const Rows& a, int64_t rows, const float* b, int64_t columns, const Out& out) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t p = 0; p * kPanel < columns; ++p) {
    const float* panel = b + p * a.segments * a.depth * kPanel;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * rows / tiles;
      const int height = int((t + 1) * rows / tiles - row);
      for (int64_t c = p * kPanel; c < minimum((p + 1) * kPanel, columns);
           c += kTilePacks * kLanes) {
        const float* part = panel + c - p * kPanel;
        if (kTilePacks > 1 && c + kLanes >= columns) {
          tile_of<kTileRows, 1>(height, a, row, part, c, out);
        } else {
          tile_of<kTileRows, kTilePacks>(height, a, row, part, c, out);
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
