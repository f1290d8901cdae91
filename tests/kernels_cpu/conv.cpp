// SPDX-License-Identifier: BSD-3-Clause
// The CPU's convolutions on buffers of exactly their size, under AddressSanitizer and UBSan: what
// reads or writes past an edge ends the program. Numbers are tested from Python.
#include <cstdio>
#include <utility>
#include <vector>

#include "cpu/params.h"
#include "cpu/table.h"

using namespace resnet_fast::cpu;

namespace {

// Pieces of three, as uneven as threads get them.
void run(int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = 0; i < n; i += 3) body(i, i + 3 < n ? i + 3 : n, context);
}

struct Shape {
  int64_t n, in_c, out_c, h, w, kernel, stride, padding, dilation = 1;
};

ConvParams params(const Shape& s) {
  ConvParams p{};
  p.n = s.n, p.in_c = s.in_c, p.out_c = s.out_c, p.in_h = s.h, p.in_w = s.w;
  p.kernel_h = p.kernel_w = s.kernel, p.stride_h = p.stride_w = s.stride;
  p.pad_h = p.pad_w = s.padding, p.dilation_h = p.dilation_w = s.dilation;
  const int64_t reach = s.dilation * (s.kernel - 1) + 1;
  p.out_h = (s.h + 2 * s.padding - reach) / s.stride + 1;
  p.out_w = (s.w + 2 * s.padding - reach) / s.stride + 1;
  p.relu = true;
  return p;
}

// Calls the kernel with buffers for `taps` matrices of weights and outputs of out_h x out_w.
template <class Kernel>
void call(ConvParams p, int64_t taps, int64_t out_h, int64_t out_w, bool residual,
          const Kernel& kernel) {
  const std::vector<float> x(p.n * p.in_h * p.in_w * p.in_c, 1.0f);
  const std::vector<float> weight(taps * p.in_c * ((p.out_c + 63) / 64 * 64), 0.5f);
  const std::vector<float> bias(p.out_c, 1.0f), added(residual ? p.n * out_h * out_w * p.out_c : 0);
  std::vector<float> y(p.n * out_h * out_w * p.out_c);
  p.x = x.data(), p.weight = weight.data(), p.bias = bias.data(), p.y = y.data();
  p.residual = residual ? added.data() : nullptr;
  kernel(p);
}

void winograd(const Shape& s, const Parallel& parallel) {
  const ConvParams p = params(s);
  for (int tile : {2, 4}) {
    for (bool residual : {false, true}) {
      call(p, (tile + 2) * (tile + 2), p.out_h, p.out_w, residual,
           [&](const ConvParams& full) { RF_ISA::conv_winograd(full, tile, parallel); });
    }
  }
}

void direct(const Shape& s, const Parallel& parallel) {
  const ConvParams p = params(s);
  for (bool residual : {false, true}) {
    call(p, s.kernel * s.kernel, p.out_h, p.out_w, residual,
         [&](const ConvParams& full) { RF_ISA::conv_direct(full, parallel); });
  }
}

void stem(const Shape& s, const Parallel& parallel) {
  const ConvParams p = params(s);
  for (bool pool : {false, true}) {
    const int64_t h = pool ? (p.out_h - 1) / 2 + 1 : p.out_h;
    const int64_t w = pool ? (p.out_w - 1) / 2 + 1 : p.out_w;
    call(p, s.kernel * s.kernel, h, w, false,
         [&](const ConvParams& full) { RF_ISA::conv_stem(full, pool, parallel); });
  }
}

// Filters of `columns` and `rows` channels, contiguous and channels-last, by their strides.
void winograd_pack(int64_t columns, int64_t rows, const Parallel& parallel) {
  const std::vector<float> weight(columns * rows * 9, 0.5f);
  for (int tile : {2, 4}) {
    std::vector<float> packed((tile + 2) * (tile + 2) * ((columns + 63) / 64) * rows * 64);
    for (bool transposed : {false, true}) {
      const int64_t inner = transposed ? columns : rows;
      for (bool last : {false, true}) {
        const int64_t outer_stride = 9 * inner, inner_stride = last ? 1 : 9;
        FilterParams p{weight.data(), packed.data(),    rows,      columns, inner_stride,
                       outer_stride,  last ? inner : 1, transposed};
        if (transposed) std::swap(p.row_stride, p.column_stride);
        RF_ISA::conv_winograd_pack(p, tile, parallel);
      }
    }
  }
}

void winograd_weight(const Shape& s, const Parallel& parallel) {
  ConvParams p = params(s);
  const std::vector<float> x(p.n * p.in_h * p.in_w * p.in_c, 1.0f);
  std::vector<float> grad(p.n * p.out_h * p.out_w * p.out_c, 0.5f);
  std::vector<float> weight(p.out_c * 9 * p.in_c);
  p.x = x.data(), p.y = grad.data();
  for (int tile : {2, 4}) RF_ISA::conv_winograd_weight(p, weight.data(), tile, parallel);
}

}  // namespace

int main() {
  for (int64_t threads : {1, 3}) {
    const Parallel parallel{threads, run};
    for (int64_t padding : {1, 2}) {
      winograd({2, 64, 64, 14, 14, 3, 1, padding}, parallel);
      winograd({1, 16, 48, 9, 11, 3, 1, padding}, parallel);
      winograd({3, 80, 32, 7, 5, 3, 1, padding}, parallel);
      winograd({1, 16, 16, 1, 2, 3, 1, padding}, parallel);
      winograd({1, 256, 96, 6, 6, 3, 1, padding}, parallel);
    }
    for (int64_t padding : {0, 1, 2}) {
      winograd_weight({2, 48, 80, 13, 9, 3, 1, padding}, parallel);
      winograd_weight({5, 80, 48, 4, 3, 3, 1, padding}, parallel);
      winograd_weight({24, 32, 16, 15, 17, 3, 1, padding}, parallel);
    }
    winograd_weight({1, 16, 16, 1, 2, 3, 1, 1}, parallel);
    winograd_pack(16, 16, parallel);
    winograd_pack(48, 80, parallel);
    winograd_pack(80, 37, parallel);
    direct({2, 64, 80, 14, 13, 1, 1, 0}, parallel);
    direct({1, 513, 16, 9, 11, 1, 1, 0}, parallel);
    direct({2, 1101, 208, 5, 5, 1, 2, 0}, parallel);
    direct({1, 16, 48, 7, 6, 1, 1, 2}, parallel);
    direct({1, 2, 16, 1, 1, 1, 1, 0}, parallel);
    direct({2, 64, 64, 28, 27, 3, 1, 1}, parallel);
    direct({1, 33, 48, 9, 12, 3, 2, 1}, parallel);
    direct({1, 16, 80, 3, 2, 3, 1, 5}, parallel);
    direct({2, 32, 16, 11, 10, 3, 1, 4, 4}, parallel);
    direct({1, 1030, 64, 3, 3, 3, 1, 0}, parallel);
    direct({1, 24, 48, 15, 9, 7, 3, 3, 2}, parallel);
    stem({2, 3, 64, 37, 41, 7, 2, 3}, parallel);
    stem({1, 1, 48, 9, 12, 3, 1, 1}, parallel);
    stem({3, 4, 32, 8, 8, 5, 2, 0}, parallel);
    stem({2, 8, 16, 3, 5, 3, 2, 1}, parallel);
    stem({1, 3, 16, 4, 33, 1, 1, 0}, parallel);
  }
  std::puts("clean");
}
