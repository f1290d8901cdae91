// SPDX-License-Identifier: BSD-3-Clause
// Convolution as a matrix product, channels-last, float32: every output pixel is a row of the
// kh * kw * C_in inputs under the kernel, gathered block by block into cache (im2col, never whole).
//
// Multiplications: N Ho Wo C_out C_in kh kw. Bytes: x once per tap from the caches, w once per
// block of rows, y and the residual once.
#include "conv_gemm.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// What a block of gathered rows may take of a core's second cache, in floats.
constexpr int64_t kBlockFloats = 100 * 1024;
constexpr int64_t kMaxBlockRows = 8 * kTileRows;

// Appends runs of floats to one row of the chunked matrix.
class RowWriter {
 public:
  RowWriter(float* row, int64_t chunk_stride) : at_(row), chunk_stride_(chunk_stride) {}

  RF_INLINE void append(const float* values, int64_t n) {
    while (n > 0) {
      const int64_t part = minimum(n, kChunk - filled_);
      copy(at_ + filled_, values, part);
      values += part;
      advance(part);
      n -= part;
    }
  }
  RF_INLINE void zeros(int64_t n) {
    while (n > 0) {
      const int64_t part = minimum(n, kChunk - filled_);
      std::memset(at_ + filled_, 0, part * sizeof(float));
      advance(part);
      n -= part;
    }
  }

 private:
  RF_INLINE void advance(int64_t n) {
    filled_ += n;
    if (filled_ == kChunk) {
      at_ += chunk_stride_;
      filled_ = 0;
    }
  }
  static RF_INLINE void copy(float* to, const float* from, int64_t n) {
    if (n == kChunk) {
      for (int i = 0; i < kChunk; i += kLanes) store(to + i, load(from + i));
    } else {
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
      for (; i < n; ++i) to[i] = from[i];
    }
  }

  float* at_;
  const int64_t chunk_stride_;
  int64_t filled_ = 0;
};

// The inputs under the kernel at output pixel (n, i, j), (kh, kw, C_in) flat, zeros outside.
RF_INLINE void gather_row(const ConvParams& p, int64_t n, int64_t i, int64_t j, RowWriter row) {
  const int64_t top = i * p.stride_h - p.pad_h, left = j * p.stride_w - p.pad_w;
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    const int64_t h = top + r * p.dilation_h;
    if (h < 0 || h >= p.in_h) {
      row.zeros(p.kernel_w * p.in_c);
      continue;
    }
    const float* line = p.x + (n * p.in_h + h) * p.in_w * p.in_c;
    if (p.dilation_w == 1) {  // the taps of a kernel row lie side by side
      const int64_t before = minimum(maximum(-left, 0), p.kernel_w);
      const int64_t last = maximum(minimum(p.in_w - left, p.kernel_w), before);
      row.zeros(before * p.in_c);
      row.append(line + (left + before) * p.in_c, (last - before) * p.in_c);
      row.zeros((p.kernel_w - last) * p.in_c);
      continue;
    }
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t w = left + s * p.dilation_w;
      if (w < 0 || w >= p.in_w) {
        row.zeros(p.in_c);
      } else {
        row.append(line + w * p.in_c, p.in_c);
      }
    }
  }
}

void gather(const ConvParams& p, int64_t begin, int64_t end, float* a) {
  const int64_t chunk_stride = (end - begin) * kChunk;
  int64_t j = begin % p.out_w, i = begin / p.out_w % p.out_h, n = begin / (p.out_w * p.out_h);
  for (int64_t r = begin; r < end; ++r) {
    gather_row(p, n, i, j, RowWriter(a + (r - begin) * kChunk, chunk_stride));
    if (++j == p.out_w) {
      j = 0;
      if (++i == p.out_h) i = 0, ++n;
    }
  }
}

}  // namespace

void conv_direct(const ConvParams& p, const Parallel& parallel) {
  const int64_t rows = p.n * p.out_h * p.out_w, depth = p.kernel_h * p.kernel_w * p.in_c;
  const int64_t panels = ceil_div(p.out_c, kPanel);
  const int64_t threads = parallel.threads;
  // Blocks of rows that fill the cache, as many as threads can share evenly; with few rows the
  // threads share the output channels instead.
  const int64_t fitting = maximum(kBlockFloats / depth / kTileRows, 2) * kTileRows;
  const int64_t at_most = minimum(fitting, kMaxBlockRows);
  int64_t blocks = ceil_div(rows, at_most);
  const bool by_rows = blocks >= 2 * threads || panels < threads;
  if (by_rows && blocks < 8 * threads) blocks = ceil_div(blocks, threads) * threads;
  const int64_t groups = by_rows ? 1 : threads;
  const ConvEpilogue epilogue{p.bias, p.residual, p.y, p.relu};
  parallel_for(parallel, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> a((rows / blocks + 1) * ceil_div(depth, kChunk) * kChunk);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks, group = item / blocks;
      const int64_t first = block * rows / blocks, last = (block + 1) * rows / blocks;
      if (first == last) continue;
      gather(p, first, last, a.get());
      gemm(a.get(), last - first, (last - first) * kChunk, p.weight, depth, group * panels / groups,
           (group + 1) * panels / groups, p.out_c,
           [&](int64_t row, int64_t c, const Pack<float>& sum)
               __attribute__((always_inline)) { epilogue((first + row) * p.out_c + c, c, sum); });
    }
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
