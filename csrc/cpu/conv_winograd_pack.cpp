// SPDX-License-Identifier: BSD-3-Clause
// Filters at the points of winograd.h, in the panels of conv_gemm.h. Bytes: the filters once, and
// (m+2)^2 / 9 of that written.
#include "table.h"
#include "winograd.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

typedef float Narrow __attribute__((vector_size(Pack<double>::kWidth * sizeof(float))));

RF_INLINE Pack<double> load_widened(const float* p) {
  Pack<double> r;
  RF_FOR_VECTORS(double) {
    Narrow part;
    std::memcpy(&part, p + i * Pack<double>::kWidth, sizeof part);
    r.v[i] = __builtin_convertvector(part, Pack<double>::Vector);
  }
  return r;
}

RF_INLINE Pack<float> narrow(const Pack<double>& a) {
  Pack<float> r;
  RF_FOR_VECTORS(double) {
    const Narrow part = __builtin_convertvector(a.v[i], Narrow);
    std::memcpy(reinterpret_cast<Narrow*>(&r) + i, &part, sizeof part);
  }
  return r;
}

// to[r] = sum over j of g[r][j] * from[j].
template <int Out>
RF_INLINE void transform_filter(const double (&g)[Out][3], const Pack<double> (&from)[3],
                                Pack<double> (&to)[Out]) {
#pragma GCC unroll 6
  for (int r = 0; r < Out; ++r) {
    const Pack<double> low = fma(broadcast(g[r][1]), from[1], broadcast(g[r][0]) * from[0]);
    to[r] = fma(broadcast(g[r][2]), from[2], low);
  }
}

constexpr int kPackRows = 16;

// The taps of up to 16 rows and of 16 columns, [row][tap][column], read in the order of memory.
void fetch_taps(const FilterParams& p, int64_t row, int64_t rows, int64_t column, float* taps) {
  const float* corner = p.weight + row * p.row_stride + column * p.column_stride;
  for (int tap = 0; tap < 9; ++tap) {
    const float* from = corner + (p.flip ? 8 - tap : tap) * p.tap_stride;
    float* to = taps + tap * kLanes;
    if (p.column_stride == 1) {
      for (int64_t k = 0; k < rows; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) {
          to[k * 9 * kLanes + lane] = from[k * p.row_stride + lane];
        }
      }
    } else {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int64_t k = 0; k < rows; ++k) {
          to[k * 9 * kLanes + lane] = from[k * p.row_stride + lane * p.column_stride];
        }
      }
    }
  }
}

// Sixteen columns of a row at every point, in double, rounded once.
template <class T>
void pack_columns(const float* taps, float* out, int64_t point_stride) {
  constexpr auto& g = kFilterTransform<T>.at;
  Pack<double> rows[T::kIn][3];
  for (int s = 0; s < 3; ++s) {
    Pack<double> column[3], to[T::kIn];
    for (int r = 0; r < 3; ++r) column[r] = load_widened(taps + (r * 3 + s) * kLanes);
    transform_filter(g, column, to);
    for (int r = 0; r < T::kIn; ++r) rows[r][s] = to[r];
  }
  for (int r = 0; r < T::kIn; ++r) {
    Pack<double> to[T::kIn];
    transform_filter(g, rows[r], to);
#pragma GCC unroll 6
    for (int s = 0; s < T::kIn; ++s) {
      store(out + (r * T::kIn + s) * point_stride, narrow(to[s]));
    }
  }
}

// Rows and a panel at a time: points lie a power of two apart in memory, so that single lines of
// them would evict each other; they are gathered and written in runs.
template <class T>
void pack(const FilterParams& p, const Parallel& parallel) {
  constexpr int kPoints = T::kIn * T::kIn, kPiece = kPackRows * kPanel;
  const int64_t panels = ceil_div(p.columns, kPanel), point_stride = panels * p.rows * kPanel;
  const int64_t groups = ceil_div(p.rows, kPackRows);
  parallel_for(parallel, panels * groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> memory(kPoints * kPiece + kPackRows * 9 * kLanes);
    float *runs = memory.get(), *taps = runs + kPoints * kPiece;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / groups, row = i % groups * kPackRows;
      const int64_t rows = minimum(kPackRows, p.rows - row);
      for (int64_t part = 0; part < kPanel; part += kLanes) {
        if (panel * kPanel + part < p.columns) {
          fetch_taps(p, row, rows, panel * kPanel + part, taps);
        } else {
          std::memset(taps, 0, kPackRows * 9 * kLanes * sizeof(float));
        }
        for (int64_t k = 0; k < rows; ++k) {
          pack_columns<T>(taps + k * 9 * kLanes, runs + k * kPanel + part, kPiece);
        }
      }
      for (int point = 0; point < kPoints; ++point) {
        float* out = p.packed + point * point_stride + (panel * p.rows + row) * kPanel;
        for (int64_t j = 0; j < rows * kPanel; j += kLanes) {
          store(out + j, load(runs + point * kPiece + j));
        }
      }
    }
  });
}
}  // namespace

void conv_winograd_pack(const FilterParams& p, int tile, const Parallel& parallel) {
  if (tile == 4) {
    pack<Tile4>(p, parallel);
  } else {
    pack<Tile2>(p, parallel);
  }
}

}  // namespace resnet_fast::cpu::RF_ISA
