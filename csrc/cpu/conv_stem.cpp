// SPDX-License-Identifier: BSD-3-Clause
// The convolution of a picture with few channels, channels-last, float32, and the 3x3 max-pooling
// with stride 2 that follows it in a ResNet's stem.
//
// A line of the padded picture holds the rows of the matrix product overlapping: the row of pixel j
// begins stride * C_in values after that of pixel j - 1. Nothing is gathered.
//
// Multiplications: N Ho Wo C_out C_in kh kw. Bytes: x twice (padded, then read), y once. With
// pooling the convolution's lines stay in the cache: only what is pooled is written.
#include "conv_gemm.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// x with its zeros around it, (n, height, width) of floats.
class Padded {
 public:
  Padded(const ConvParams& p, const Parallel& parallel)
      : width((p.in_w + 2 * p.pad_w) * p.in_c),
        height(p.in_h + 2 * p.pad_h),
        memory_(p.n * height * width) {
    parallel_for(parallel, p.n * height, 16, [&](int64_t begin, int64_t end) {
      const int64_t side = p.pad_w * p.in_c, middle = p.in_w * p.in_c;
      for (int64_t line = begin; line < end; ++line) {
        const int64_t h = line % height - p.pad_h, n = line / height;
        float* to = memory_.get() + line * width;
        if (h < 0 || h >= p.in_h) {
          std::memset(to, 0, width * sizeof(float));
          continue;
        }
        std::memset(to, 0, side * sizeof(float));
        std::memcpy(to + side, p.x + (n * p.in_h + h) * middle, middle * sizeof(float));
        std::memset(to + side + middle, 0, side * sizeof(float));
      }
    });
  }
  // Where the kernel lies for the first pixel of output line i.
  const float* top(const ConvParams& p, int64_t n, int64_t i) const {
    return memory_.get() + (n * height + i * p.stride_h) * width;
  }
  const int64_t width, height;

 private:
  const Scratch<float> memory_;
};

// pool: whether y is a line that stays in the cache.
void compute_line(const ConvParams& p, const Padded& x, int64_t n, int64_t i, bool pool, float* y) {
  const ConvEpilogue epilogue{p.bias, nullptr, y, p.relu};
  const Rows rows{x.top(p, n, i), p.stride_w * p.in_c, p.kernel_w * p.in_c, p.kernel_h, x.width};
  const int64_t panels = ceil_div(p.out_c, kPanel);
  gemm(rows, {0, p.out_w}, p.weight, {0, panels}, p.out_c, nullptr, {},
       PixelsOut{epilogue, p.out_c, !pool});
}

// The larger, NaN where either is.
RF_INLINE Pack<float> larger(const Pack<float>& a, const Pack<float>& b) {
  Pack<float> r;
  RF_FOR_VECTORS(float) {
    const auto kept = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
    r.v[i] = b.v[i] == b.v[i] ? kept : b.v[i];
  }
  return r;
}

// One pooled line of up to three lines; those outside the picture are null.
void pool_lines(const ConvParams& p, const float* const (&lines)[3], float* y) {
  const int64_t width = (p.out_w - 1) / 2 + 1;
  for (int64_t j = 0; j < width; ++j) {
    const int64_t first = maximum(2 * j - 1, 0), last = minimum(2 * j + 2, p.out_w);
    for (int64_t c = 0; c < p.out_c; c += kLanes) {
      Pack<float> most = broadcast(-__builtin_inff());
      for (const float* line : lines) {
        if (line == nullptr) continue;
        for (int64_t w = first; w < last; ++w) most = larger(most, load(line + w * p.out_c + c));
      }
      store(y + j * p.out_c + c, most);
    }
  }
}

// Pooled lines [begin, end) of all pictures, three lines of the convolution at a time in memory.
void pooled(const ConvParams& p, const Padded& x, int64_t begin, int64_t end) {
  const int64_t line_size = p.out_w * p.out_c, height = (p.out_h - 1) / 2 + 1;
  const int64_t pooled_size = ((p.out_w - 1) / 2 + 1) * p.out_c;
  const Scratch<float> memory(3 * line_size);
  int64_t computed = -1;  // the line of the convolution, counted over all pictures, made last
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / height, middle = line % height * 2;
    const float* lines[3];
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t i = middle - 1 + k, number = n * p.out_h + i;
      float* const slot = memory.get() + (i + 3) % 3 * line_size;
      const bool inside = i >= 0 && i < p.out_h;
      if (inside && number > computed) {
        compute_line(p, x, n, i, true, slot);
        computed = number;
      }
      lines[k] = inside ? slot : nullptr;
    }
    pool_lines(p, lines, p.y + line * pooled_size);
  }
}

}  // namespace

void conv_stem(const ConvParams& p, bool max_pool, const Parallel& parallel) {
  const Padded x(p, parallel);
  if (max_pool) {
    parallel_for(parallel, p.n * ((p.out_h - 1) / 2 + 1), 1,
                 [&](int64_t begin, int64_t end) { pooled(p, x, begin, end); });
    return;
  }
  parallel_for(parallel, p.n * p.out_h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      compute_line(p, x, line / p.out_h, line % p.out_h, false, p.y + line * p.out_w * p.out_c);
    }
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
