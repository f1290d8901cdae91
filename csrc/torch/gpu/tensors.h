// SPDX-License-Identifier: BSD-3-Clause
// Between tensors and the launchers' parameters: device and stream, shapes, per-channel arrays.
//
// This folder is compiled twice: for CUDA, where tensors are on a GPU, and with RF_EMULATE, where
// the same launchers run the same kernels under the emulator and tensors are on the CPU. Nothing
// here allocates outside torch's allocator or waits for the GPU, so every op can be captured in a
// CUDA graph.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../common.h"
#include "launch/params.h"

namespace resnet_fast {

// Makes x's device the current one while it lives.
class OnDevice {
 public:
  // Raises if x, the argument called name, is not on a device that this build's kernels run on.
  OnDevice(const Tensor& x, const char* name);
  // PyTorch's current stream of that device.
  Stream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

DType dtype_of(const Tensor& x, const char* name);
Shape shape_of(const Tensor& x, bool channels_last);

// A per-channel tensor as the kernels read it: dense and in x's accumulation type; t itself where
// it is that.
Tensor as_channel(const Tensor& t, const Tensor& x);
OptionalTensor as_channel(const OptionalTensor& t, const Tensor& x);
// A new one of x's channels, in its accumulation type.
Tensor new_channel(const Tensor& x);
// t in another dtype; t itself where it has it.
Tensor as_type(const Tensor& t, ScalarType type);
Tensor new_bytes(const Tensor& x, std::size_t bytes);

const void* data_of(const OptionalTensor& t);
void* mutable_data_of(const OptionalTensor& t);
// The tensor's data where it is wanted, else null.
void* data_if(bool wanted, const Tensor& t);

// The tensors of a backward as the kernels read them: x and grad dense in one layout, per-channel
// ones as by as_channel(). What fill() puts into p is good while this lives.
struct GradInput {
  GradInput(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd,
            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mask);
  void fill(BatchNormGradInput* p) const;

  bool channels_last;
  Tensor grad, x, mean, invstd;
  OptionalTensor weight, bias, mask;
};

// Raises with the op's name if the launch failed.
void check_status(const Status& status, const char* op);

}  // namespace resnet_fast
