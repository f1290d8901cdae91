// SPDX-License-Identifier: BSD-3-Clause
// Convolution as a matrix product whose rows are gathered by pointers, not copied (Dukhan, "The
// Indirect Convolution Algorithm", 2019), channels-last, float32: 1x1, strided, dilated, any size.
//
// Multiplications: N Ho Wo C_out C_in kh kw. Bytes: x once from memory where a block's lines stay
// in the caches, the weights once a call and then from the caches, y and residual once.
#include "conv_gemm.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// The windows of pixels, a run for each tap of the kernel; outside the picture zeros are read.
struct Windows {
  const ConvParams& p;
  const float* zeros;  // C_in of them
  int64_t depth, runs;

  template <int Height>
  class Walk {
   public:
    Walk(const Windows& a, int64_t row, int64_t run)
        : a_(a), down_(run / a.p.kernel_w), across_(run % a.p.kernel_w) {
      const ConvParams& p = a.p;
      int64_t j = row % p.out_w, i = row / p.out_w % p.out_h, n = row / p.out_w / p.out_h;
      for (int r = 0; r < Height; ++r) {
        picture_[r] = p.x + n * p.in_h * p.in_w * p.in_c;
        top_[r] = i * p.stride_h - p.pad_h;
        left_[r] = j * p.stride_w - p.pad_w;
        if (++j < p.out_w) continue;
        j = 0;
        if (++i < p.out_h) continue;
        i = 0, ++n;
      }
    }
    RF_INLINE void next(const float* (&rows)[Height]) {
      const ConvParams& p = a_.p;
      const int64_t down = down_ * p.dilation_h, across = across_ * p.dilation_w;
      for (int r = 0; r < Height; ++r) {
        const int64_t h = top_[r] + down, w = left_[r] + across;
        const bool inside = h >= 0 && h < p.in_h && w >= 0 && w < p.in_w;
        rows[r] = inside ? picture_[r] + (h * p.in_w + w) * p.in_c : a_.zeros;
      }
      if (++across_ == p.kernel_w) across_ = 0, ++down_;
    }

   private:
    const Windows& a_;
    const float* picture_[Height];
    int64_t top_[Height], left_[Height];
    int64_t down_, across_;
  };
};

// Into how many parts rows and panels are split, for as many threads.
struct Split {
  int64_t rows, panels;
};

// The one of which the largest part has the least to multiply and all parts the least to read.
Split split_of(int64_t rows, int64_t panels, int64_t depth, int64_t threads) {
  constexpr int64_t kProducts = 96;  // floats read in the time of a tile's step; a first guess
  Split best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t across = 1; across <= minimum(threads, panels); ++across) {
    const int64_t down = threads / across;
    const int64_t tiles = ceil_div(ceil_div(rows, down), kTileRows) * ceil_div(panels, across);
    const int64_t floats = (across * rows + down * panels * kPanel) * depth / threads;
    const int64_t cost = tiles * depth * kProducts + floats;
    if (cost < least) least = cost, best = {down, across};
  }
  return best;
}

template <class A>
void multiply_all(const A& a, const ConvParams& p, const Parallel& parallel) {
  const ConvEpilogue epilogue{p.bias, p.residual, p.y, p.relu};
  const Range rows{0, p.n * p.out_h * p.out_w}, panels{0, ceil_div(p.out_c, kPanel)};
  const int64_t macs = rows.size() * a.runs * a.depth * p.out_c;
  const int64_t threads = minimum(parallel.threads, maximum(macs >> 18, 1));
  const Split split = split_of(rows.size(), panels.size(), a.runs * a.depth, threads);
  const int64_t parts = split.rows * split.panels;
  const bool far = rows.size() * p.out_c > kFarFloats;
  parallel_for(parallel, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range across = panels.part(part / split.rows, split.panels);
      gemm(a, rows.part(part % split.rows, split.rows), p.weight, across, p.out_c,
           p.weight + across.last * kPanel * a.runs * a.depth, next_weights(p, part, parts),
           PixelsOut{epilogue, p.out_c, far});
    }
  });
}

}  // namespace

void conv_direct(const ConvParams& p, const Parallel& parallel) {
  const bool pixels = p.kernel_h * p.kernel_w * p.stride_h * p.stride_w == 1;
  if (pixels && p.pad_h == 0 && p.pad_w == 0) {
    return multiply_all(Rows{p.x, p.in_c, p.in_c}, p, parallel);
  }
  const Scratch<float> zeros(p.in_c);
  std::memset(zeros.get(), 0, p.in_c * sizeof(float));
  multiply_all(Windows{p, zeros.get(), p.in_c, p.kernel_h * p.kernel_w}, p, parallel);
}

}  // namespace resnet_fast::cpu::RF_ISA
