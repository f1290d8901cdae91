// SPDX-License-Identifier: BSD-3-Clause
// What each CPU kernel is given: plain structures of pointers and sizes, no torch.
//
// An activation is dense, in one of two memory orders, and described by a Geometry:
//   channels-last:  rows = N*H*W, inner = 1        element (row, c)    at row * C + c
//   contiguous:     rows = N,     inner = H*W      element (n, c, i)   at (n * C + c) * inner + i
// A mask holds one bit an element in memory order, bit i % 16 of word i / 16.
// "Accumulation type" is double for double, else float.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

struct Geometry {
  int64_t rows;
  int64_t channels;
  int64_t inner;
  int64_t numel() const { return rows * channels * inner; }
  int64_t count() const { return rows * inner; }  // values per channel
};

// PyTorch's thread pool behind a plain function: run body over [0, n) in contiguous ranges.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
              void* context);
};

// y = relu(x + residual); mask may be null. `stream`: y is too large for the cache.
struct AddReluParams {
  const void* x;
  const void* residual;
  void* y;
  uint16_t* mask;
  int64_t numel;
  DType dtype;
  bool stream;
};

// dx = grad where the mask's bit is set, else 0.
struct MaskedGradParams {
  const void* grad;
  const uint16_t* mask;
  void* dx;
  int64_t numel;
  DType dtype;
  bool stream;
};

// One scale for each image and channel, (images, channels) in the accumulation type, and the order
// of the elements they belong to. One scale for all: images and channels are 1, pixels is numel.
struct ScaleParams {
  const void* scale;
  int64_t images;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
};

// y = relu(x * scale + residual); mask may be null.
struct ScaledAddReluParams {
  const void* x;
  const void* residual;
  void* y;
  uint16_t* mask;
  ScaleParams scale;
  DType dtype;
  bool stream;
};

// dresidual = grad where the mask's bit is set, else 0; dx = dresidual * scale; dscale: the sum of
// dresidual * x over each image and channel. Each may be null, x where dscale is.
struct ScaledAddReluGradParams {
  const void* grad;
  const void* x;
  const uint16_t* mask;
  void* dx;
  void* dresidual;
  double* dscale;
  ScaleParams scale;
  DType dtype;
  bool stream;
};

// Per channel, in double: mean and sum of squared deviations from it.
struct BnStatsParams {
  const void* x;
  double* mean;
  double* m2;
  Geometry geometry;
  DType dtype;
};

// y = (x - mean) * scale + bias [+ residual] [relu]; coefficients in the accumulation type, (C,).
struct BnApplyParams {
  const void* x;
  const void* residual;  // or null
  void* y;
  uint16_t* mask;  // or null
  const void* mean;
  const void* scale;
  const void* bias;
  Geometry geometry;
  DType dtype;
  bool relu;
  bool stream;
};

// Where the ReLU's mask comes from in the backward.
enum class MaskSource { kNone, kBits, kRecompute };

// The backward's first pass: sum of g and of g * (x - mean) per channel, g the masked gradient,
// which is also written out where `masked` is given.
struct BnReduceParams {
  const void* grad;
  const void* x;
  const uint16_t* mask;
  void* masked;  // or null
  const void* mean;
  const void* scale;
  const void* bias;
  double* sum;
  double* dot;
  Geometry geometry;
  DType dtype;
  MaskSource source;
  bool stream;
};

// The backward's second pass: dx = scale * (g - offset - (x - mean) * slope).
// In eval mode offset and slope are null: dx = scale * g.
struct BnGradParams {
  const void* grad;
  const void* x;
  const uint16_t* mask;
  void* masked;  // or null
  void* dx;      // or null
  const void* mean;
  const void* scale;
  const void* bias;
  const void* offset;
  const void* slope;
  Geometry geometry;
  DType dtype;
  MaskSource source;
  bool stream;
};

// y = the largest of each window of 3x3, stride 2, padding 1; place: which of the nine, or null.
// All channels-last.
struct MaxPoolParams {
  const void* x;
  void* y;
  uint8_t* place;
  int64_t images, channels;
  int64_t height, width;
  int64_t out_height, out_width;
  DType dtype;
};

// dx = the sum of the gradients of the windows whose largest a pixel was.
struct MaxPoolGradParams {
  const void* grad;
  const uint8_t* place;
  void* dx;
  int64_t images, channels;
  int64_t height, width;
  int64_t out_height, out_width;
  DType dtype;
  bool stream;
};

// y = conv(x, w) + bias [+ residual] [relu] in float32, all channels-last, C_out a multiple of 16.
// weight: panels of 64 output channels, zero-filled: [panel][k][64], k = (kh, kw, C_in) flat, or
// for Winograd [point][panel][C_in][64]. bias: of every output channel.
struct ConvParams {
  const float* x;  // (n, in_h, in_w, in_c)
  const float* weight;
  const float* bias;
  const float* residual;  // or null; like y, and may be y
  float* y;               // (n, out_h, out_w, out_c)
  int64_t n, in_h, in_w, in_c;
  int64_t out_h, out_w, out_c;
  const float* next;  // weights that are read next, or null
  int64_t next_floats;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool relu;
};

// Filters of 3x3 packed for Winograd: packed[point][panel][k][64] of the values at the points, for
// rows k and columns in panels, from weight[k * row_stride + column * column_stride + tap *
// tap_stride]; flip: taps from the last to the first. columns: a multiple of 16.
struct FilterParams {
  const float* weight;
  float* packed;
  int64_t rows, columns;
  int64_t row_stride, column_stride, tap_stride;
  bool flip;
};

// The kernels of one instruction set.
struct KernelTable {
  void (*add_relu)(const AddReluParams&, const Parallel&);
  void (*masked_grad)(const MaskedGradParams&, const Parallel&);
  void (*scaled_add_relu)(const ScaledAddReluParams&, const Parallel&);
  void (*scaled_add_relu_grad)(const ScaledAddReluGradParams&, const Parallel&);
  void (*bn_stats)(const BnStatsParams&, const Parallel&);
  void (*bn_apply)(const BnApplyParams&, const Parallel&);
  void (*bn_reduce)(const BnReduceParams&, const Parallel&);
  void (*bn_grad)(const BnGradParams&, const Parallel&);
  void (*max_pool)(const MaxPoolParams&, const Parallel&);
  void (*max_pool_grad)(const MaxPoolGradParams&, const Parallel&);
  // 3x3, stride 1, C_in a multiple of 16; tile: 2 or 4, the output pixels a side of a tile.
  void (*conv_winograd)(const ConvParams&, int tile, const Parallel&);
  void (*conv_winograd_pack)(const FilterParams&, int tile, const Parallel&);
  // weight (C_out, 3, 3, C_in): the filter's gradient, with the outputs' in y, which is only read.
  void (*conv_winograd_weight)(const ConvParams&, float* weight, int tile, const Parallel&);
  // Any kernel of one group.
  void (*conv_direct)(const ConvParams&, const Parallel&);
  // Few channels, no residual; max_pool: y holds the lines pooled 3x3 with stride 2.
  void (*conv_stem)(const ConvParams&, bool max_pool, const Parallel&);
};

// Those of the widest instruction set that this processor runs and this binary holds.
const KernelTable& kernels();

}  // namespace resnet_fast::cpu
