// SPDX-License-Identifier: BSD-3-Clause
// The matrix product inside the convolutions: rows of pixels times panels of 64 output channels.
//
// A row of A is a number of runs of `depth` values; where they begin is the business of a class
// (Rows here, Windows in conv_direct.cpp). B lies in panels of 64 columns, [k][64], zero-filled
// past the last channel. A tile of few rows and many columns asks for the fewest loads a product.
//
// The order of additions depends on the depth alone: chunks of kChunk values, each from zero, then
// added up. That rounds less than one long sum, and no split among threads changes a bit.
#pragma once

#include "loops.h"

namespace resnet_fast::cpu::RF_ISA {

constexpr int kPanel = 64;
// Values of a row, and of a panel's column, at once: with the rows of a block they stay in the
// second cache.
constexpr int64_t kChunk = 512, kBlockFloats = 48 * 1024;
// Outputs from which their lines are fetched before they are written.
constexpr int64_t kFarFloats = 512 * 1024;

// Rows and packs of a tile: its accumulators fill the registers but for those of B and a broadcast.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTilePacks = 4;
#elif defined(__aarch64__) || defined(__AVX2__)
constexpr int kTileRows = 6, kTilePacks = 1;
#else
constexpr int kTileRows = 2, kTilePacks = 1;
#endif

// The stride for rows of n values that are written for the product alone. A stride that is a large
// power of two would make the rows of a tile evict each other from the first cache.
RF_INLINE int64_t padded_row(int64_t n) { return ceil_div(n, kLanes) * kLanes + kLanes; }

// Rows a fixed stride apart; the runs of a row lie run_stride apart.
struct Rows {
  const float* first;
  int64_t row_stride;
  int64_t depth;
  int64_t runs = 1, run_stride = 0;

  // Where run after run of Height rows begins.
  template <int Height>
  class Walk {
   public:
    Walk(const Rows& a, int64_t row, int64_t run)
        : a_(a), at_(a.first + row * a.row_stride + run * a.run_stride) {}
    RF_INLINE void next(const float* (&rows)[Height]) {
#pragma GCC unroll 6
      for (int i = 0; i < Height; ++i) rows[i] = at_ + i * a_.row_stride;
      at_ += a_.run_stride;
    }

   private:
    const Rows& a_;
    const float* at_;
  };
};

// Memory that is read soon, fetched into the second cache a little at a time.
struct Ahead {
  const float *at = nullptr, *end = nullptr;
  RF_INLINE void fetch() {
    if (at < end) {
      __builtin_prefetch(at, 0, 2);
      __builtin_prefetch(at + kLanes, 0, 2);
      at += 2 * kLanes;
    }
  }
};

// Runs [first, last) of every row; of each the values [from, from + depth).
struct Chunk {
  int64_t first, last, from, depth;
  bool begins, ends;  // the rows
  int64_t values() const { return (last - first) * depth; }
};

// The sums of a tile. Vectors of their own, not Packs: the compiler keeps structures of several
// vectors in memory, where the product takes two to three times as long.
template <int Height, int Packs>
class Sums {
 public:
  static constexpr int kVectors = Pack<float>::kVectors, kWidth = Pack<float>::kWidth;
  typedef Pack<float>::Vector Vector;

  RF_INLINE Sums() {
#pragma GCC unroll 6
    for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Packs * kVectors; ++j) acc_[i][j] = Vector{};
    }
  }
  // += values(i) * columns[...] for each row i.
  template <class Values>
  RF_INLINE void add_products(const float* columns, const Values& values) {
    Vector b[Packs * kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < Packs * kVectors; ++j) {
      std::memcpy(&b[j], columns + j * kWidth, sizeof(Vector));
    }
#pragma GCC unroll 6
    for (int i = 0; i < Height; ++i) {
      const Vector value = values(i) - Vector{};
#pragma GCC unroll 4
      for (int j = 0; j < Packs * kVectors; ++j) acc_[i][j] = fma_vector(value, b[j], acc_[i][j]);
    }
  }
  // Sixteen columns of a row.
  RF_INLINE Pack<float> pack(int i, int j) const {
    Pack<float> r;
    for (int k = 0; k < kVectors; ++k) r.v[k] = acc_[i][j * kVectors + k];
    return r;
  }

 private:
  Vector acc_[Height][Packs * kVectors];
};

// acc += A[0..Height) * B, over the values [k, k + Steps) of each row.
template <int Steps, int Height, int Packs>
RF_INLINE void multiply_steps(const float* const (&rows)[Height], int64_t k, const float* b,
                              Sums<Height, Packs>& acc) {
#pragma GCC unroll 4
  for (int step = 0; step < Steps; ++step) {
    acc.add_products(b + step * kPanel, [&](int i) RF_LAMBDA { return rows[i][k + step]; });
  }
}

template <int Height, int Packs>
RF_INLINE void multiply(const float* const (&rows)[Height], int64_t depth, const float* b,
                        Sums<Height, Packs>& acc, Ahead& ahead) {
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4, b += 4 * kPanel) {
    ahead.fetch();
    multiply_steps<4>(rows, k, b, acc);
    asm("" : "+r"(k));  // keeps the compiler from counting every row's pointer up
  }
  for (; k < depth; ++k, b += kPanel) multiply_steps<1>(rows, k, b, acc);
}

// A chunk of a tile: sums holds what the chunks before it came to, kPanel to a row.
template <int Height, int Packs, class A, class Out>
void tile(const A& a, const Chunk& chunk, int64_t row, const float* b, int64_t column, float* sums,
          Ahead ahead, const Out& out) {
  if (chunk.ends && out.far) {
#pragma GCC unroll 6
    for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Packs; ++j) out.fetch(row + i, column + j * kLanes);
    }
  }
  Sums<Height, Packs> acc;
  typename A::template Walk<Height> walk(a, row, chunk.first);
  for (int64_t run = chunk.first; run < chunk.last; ++run) {
    const float* rows[Height];
    walk.next(rows);
#pragma GCC unroll 6
    for (int i = 0; i < Height; ++i) rows[i] += chunk.from;
    multiply(rows, chunk.depth, b, acc, ahead);
    b += chunk.depth * kPanel;
  }
  if (chunk.begins && chunk.ends) {
#pragma GCC unroll 6
    for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Packs; ++j) out(row + i, column + j * kLanes, acc.pack(i, j));
    }
    return;
  }
#pragma GCC unroll 6
  for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Packs; ++j) {
      float* before = sums + i * kPanel + j * kLanes;
      const Pack<float> sum = chunk.begins ? acc.pack(i, j) : acc.pack(i, j) + load(before);
      if (chunk.ends) {
        out(row + i, column + j * kLanes, sum);
      } else {
        store(before, sum);
      }
    }
  }
}

// tile<> of `height` rows, 1 to Height.
template <int Height, int Packs, class A, class Out>
RF_INLINE void tile_of(int height, const A& a, const Chunk& chunk, int64_t row, const float* b,
                       int64_t column, float* sums, const Ahead& ahead, const Out& out) {
  if constexpr (Height > 1) {
    if (height < Height) {
      return tile_of<Height - 1, Packs>(height, a, chunk, row, b, column, sums, ahead, out);
    }
  }
  tile<Height, Packs>(a, chunk, row, b, column, sums, ahead, out);
}

struct Range {
  int64_t first, last;
  int64_t size() const { return last - first; }
  // The part-th of `parts` parts that differ by one at the most.
  Range part(int64_t part, int64_t parts) const {
    return {first + part * size() / parts, first + (part + 1) * size() / parts};
  }
};

template <int Value>
struct Number {
  static constexpr int value = Value;
};

// body(Number of packs, first column) for runs of packs that a tile takes, up to `columns`, a
// multiple of 16.
template <class Body>
RF_INLINE void for_packs(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + kTilePacks * kLanes <= columns; c += kTilePacks * kLanes)
    body(Number<kTilePacks>{}, c);
  if constexpr (kTilePacks > 2) {
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) body(Number<2>{}, c);
  }
  if constexpr (kTilePacks > 1) {
    for (; c < columns; c += kLanes) body(Number<1>{}, c);
  }
}

// A chunk of a panel, [values][64], of which `columns` count, times a block of rows. ahead: what
// the next call reads of B.
template <class A, class Out>
void multiply_panel(const A& a, const Chunk& chunk, Range rows, const float* b, Range columns,
                    float* sums, const Ahead& ahead, const Out& out) {
  const int64_t tiles = ceil_div(rows.size(), kTileRows);
  const int64_t slice = ceil_div(ceil_div(ahead.end - ahead.at, tiles), 2 * kLanes) * 2 * kLanes;
  for (int64_t t = 0; t < tiles; ++t) {
    const Range at = rows.part(t, tiles);
    float* kept = sums + (at.first - rows.first) * kPanel;
    Ahead part{ahead.at + minimum(t * slice, ahead.end - ahead.at), ahead.end};
    part.end = part.at + minimum(slice, part.end - part.at);
    for_packs(columns.size(), [&](auto packs, int64_t c) {
      tile_of<kTileRows, packs.value>(int(at.size()), a, chunk, at.first, b + c, columns.first + c,
                                      kept + c, part, out);
      part.at = part.end;
    });
  }
}

// Rows of A times panels of B, of `columns` columns in all, a multiple of 16: if out.far,
// out.fetch(row, column) before a tile is computed, so that its lines are there when
// out(row, column, pack) takes every 16 columns of a row. end: of the weights that lie behind these
// and are wanted next; then: what is after that.
template <class A, class Out>
void gemm(const A& a, Range rows, const float* b, Range panels, int64_t columns, const float* end,
          const Ahead& then, const Out& out) {
  if (rows.size() == 0) return;  // more threads than rows
  const int64_t runs = minimum(maximum(kChunk / a.depth, 1), a.runs);
  const int64_t cuts = ceil_div(a.depth, kChunk), values = a.runs * a.depth;
  const int64_t at_once = maximum(kBlockFloats / (runs * ceil_div(a.depth, cuts)), 4 * kTileRows);
  const int64_t blocks = ceil_div(rows.size(), at_once);
  const bool whole = cuts == 1 && runs == a.runs;
  const Scratch<float> sums(whole ? 0 : ceil_div(rows.size(), blocks) * kPanel);
  for (int64_t k = 0; k < blocks; ++k) {
    const Range block = rows.part(k, blocks);
    for (int64_t p = panels.first; p < panels.last; ++p) {
      const Range at{p * kPanel, minimum((p + 1) * kPanel, columns)};
      const float* from = b + p * values * kPanel;
      for (int64_t run = 0; run < a.runs; run += runs) {
        for (int64_t cut = 0; cut < cuts; ++cut) {
          const Range part = Range{0, a.depth}.part(cut, cuts);
          const int64_t last = minimum(run + runs, a.runs);
          const bool begins = run + cut == 0, ends = last == a.runs && cut + 1 == cuts;
          const Chunk chunk{run, last, part.first, part.size(), begins, ends};
          const float* next = from + chunk.values() * kPanel;
          Ahead ahead;  // later blocks find the weights in a cache
          if (next < end && k == 0) ahead = {next, next + minimum(kChunk * kPanel, end - next)};
          if (next >= end && k + 1 == blocks) ahead = then;
          multiply_panel(a, chunk, block, from, at, sums.get(), ahead, out);
          from = next;
        }
      }
    }
  }
}

// Of the weights that the next convolution reads, what the part-th of `parts` threads reads first.
inline Ahead next_weights(const ConvParams& p, int64_t part, int64_t parts) {
  if (p.next == nullptr) return {};
  const int64_t first = part * p.next_floats / parts;
  return {p.next + first, p.next + first + minimum(kChunk * kPanel, p.next_floats - first)};
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

// Pixels one after the other. far: whether they are more than the second cache holds.
struct PixelsOut {
  const ConvEpilogue& epilogue;
  int64_t channels;
  bool far;

  RF_INLINE void fetch(int64_t row, int64_t column) const {
    const int64_t offset = row * channels + column;
    if (epilogue.residual) __builtin_prefetch(epilogue.residual + offset);
    if (epilogue.residual != epilogue.y) __builtin_prefetch(epilogue.y + offset, 1);
  }
  RF_INLINE void operator()(int64_t row, int64_t column, const Pack<float>& sum) const {
    epilogue(row * channels + column, column, sum);
  }
};

}  // namespace resnet_fast::cpu::RF_ISA
