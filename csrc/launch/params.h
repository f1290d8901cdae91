// SPDX-License-Identifier: BSD-3-Clause
// What the binding hands to the kernels: one plain struct and one launch function per op. Free of
// CUDA and torch headers; the same functions exist in the CUDA build and in the emulator's.
//
// Tensors are dense. x, y, residual, grad, dx and dresidual share dtype, shape and layout;
// per-channel arrays are float32 (float64 where dtype is float64). Any alignment of the element
// type is right; 16 bytes is fast. Launches neither allocate nor synchronise, and can be captured
// in a CUDA graph. Outputs must not overlap inputs, but for dx, which may be grad itself. Empty
// tensors are allowed where nothing else is said.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch/status.h"

namespace resnet_fast {

enum class DType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };
enum class Layout : int { kContiguous, kChannelsLast };

// (N, C, *): inner is the product of the sizes behind C, 1 for a matrix.
struct Shape {
  int64_t n = 0;
  int64_t c = 0;
  int64_t inner = 1;
  Layout layout = Layout::kContiguous;
};

// Whether the current device can run this build's kernels: it has code for it, and the driver is
// new enough.
Status device_status();

struct AddReluParams {
  DType dtype = DType::kFloat32;
  int64_t elements = 0;
  const void* x = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  uint8_t* mask = nullptr;  // 2 * ceil(elements / 16) bytes, or null
};
Status launch_add_relu(const AddReluParams& params, Stream stream);

struct AddReluBackwardParams {
  DType dtype = DType::kFloat32;
  int64_t elements = 0;
  const void* grad = nullptr;
  const uint8_t* mask = nullptr;
  void* dx = nullptr;
};
Status launch_add_relu_backward(const AddReluBackwardParams& params, Stream stream);

struct BatchNormActParams {
  DType dtype = DType::kFloat32;
  Shape shape;
  const void* x = nullptr;
  const void* residual = nullptr;  // or null
  void* y = nullptr;
  uint8_t* mask = nullptr;       // 2 * ceil(elements / 16) bytes, or null; only with relu
  const void* weight = nullptr;  // or null: 1
  const void* bias = nullptr;    // or null: 0
  // training: updated, both or neither may be null. Otherwise: read.
  void* running_mean = nullptr;
  void* running_var = nullptr;
  void* mean = nullptr;     // (C,), written
  void* invstd = nullptr;   // (C,), written
  void* scratch = nullptr;  // batch_norm_act_scratch_bytes(), aligned to 16 bytes; training only
  bool training = false;    // use the batch's statistics
  bool relu = true;
  double momentum = 0.1;
  double eps = 1e-5;
};
std::size_t batch_norm_act_scratch_bytes(const BatchNormActParams& params);
// The whole forward: statistics if training, then apply; for small feature maps both in one kernel.
Status launch_batch_norm_act(const BatchNormActParams& params, Stream stream);
// Its two parts. Statistics: mean, invstd and the running statistics. Apply: y and the mask.
Status launch_bn_stats(const BatchNormActParams& params, Stream stream);
Status launch_bn_apply(const BatchNormActParams& params, Stream stream);

// What every backward of a batch norm reads.
struct BatchNormGradInput {
  DType dtype = DType::kFloat32;
  Shape shape;
  const void* grad = nullptr;
  const void* x = nullptr;
  const void* mean = nullptr;
  const void* invstd = nullptr;
  const void* weight = nullptr;   // or null: 1
  const void* bias = nullptr;     // or null: 0
  const uint8_t* mask = nullptr;  // or null: with relu, the mask is recomputed from x
  bool relu = true;
};

struct BatchNormActBackwardParams : BatchNormGradInput {
  void* dx = nullptr;  // null: not wanted, as the next three
  void* dresidual = nullptr;
  void* dweight = nullptr;
  void* dbias = nullptr;
  void* scratch = nullptr;  // batch_norm_act_backward_scratch_bytes(), aligned to 16 bytes
  bool training = false;
};
std::size_t batch_norm_act_backward_scratch_bytes(const BatchNormActBackwardParams& params);
Status launch_batch_norm_act_backward(const BatchNormActBackwardParams& params, Stream stream);

// The phases of a batch norm over several processes, which communicate in between: what they send
// is float64, whatever the dtype. The forward's second phase is launch_bn_apply. No empty tensors.
struct BatchNormStatisticsParams {
  DType dtype = DType::kFloat32;
  Shape shape;
  const void* x = nullptr;
  double* mean = nullptr;   // (C,), written
  double* m2 = nullptr;     // (C,), written: sum of squared deviations from the mean
  void* scratch = nullptr;  // batch_norm_statistics_scratch_bytes(), aligned to 16 bytes
};
std::size_t batch_norm_statistics_scratch_bytes(const BatchNormStatisticsParams& params);
Status launch_batch_norm_statistics(const BatchNormStatisticsParams& params, Stream stream);

struct BatchNormActBackwardReduceParams : BatchNormGradInput {
  void* masked = nullptr;   // null: not wanted; the gradient behind the ReLU
  double* sum = nullptr;    // (C,), written: of the gradient behind the ReLU, and of
  double* dot = nullptr;    // (C,), written: its product with x - mean
  void* scratch = nullptr;  // batch_norm_act_backward_reduce_scratch_bytes(), aligned to 16 bytes
};
std::size_t batch_norm_act_backward_reduce_scratch_bytes(
    const BatchNormActBackwardReduceParams& params);
Status launch_batch_norm_act_backward_reduce(const BatchNormActBackwardReduceParams& params,
                                             Stream stream);

// grad is the one behind the ReLU: bias, mask and relu are not read.
struct BatchNormActBackwardApplyParams : BatchNormGradInput {
  const void* sum = nullptr;  // (C,), as dot: of all processes, but in the type of mean
  const void* dot = nullptr;
  double count = 1;  // values of a channel, of all processes
  void* dx = nullptr;
};
Status launch_batch_norm_act_backward_apply(const BatchNormActBackwardApplyParams& params,
                                            Stream stream);

}  // namespace resnet_fast
