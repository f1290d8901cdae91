// SPDX-License-Identifier: BSD-3-Clause
// Between tensors and the kernels' parameters: checks, layouts, outputs, coefficients.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/params.h"

namespace resnet_fast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// PyTorch's own threads.
const cpu::Parallel& torch_threads();

cpu::DType dtype_of(const Tensor& x, const char* name);
ScalarType accumulate_type(const Tensor& x);
std::string shape_text(const Tensor& t);

// Dense in channels-last order (4-D, 5-D) and not contiguous as well.
bool is_channels_last(const Tensor& x);
// x itself where it is dense in that order, else a copy.
Tensor to_layout(const Tensor& x, bool channels_last);
cpu::Geometry geometry_of(const Tensor& x, bool channels_last);

// A new tensor like the dense x. Large ones are put on huge pages, where the system has them: a
// fresh tensor's page faults otherwise cost several times what writing it does.
Tensor new_like(const Tensor& x);
Tensor new_mask(const Tensor& x);
Tensor nothing(const Tensor& x, ScalarType type);
int64_t mask_bytes(int64_t numel);

// Larger than what the cache keeps for the next operation: written past it.
bool too_large_for_cache(const Tensor& x);

void check_cpu(const char* name, const Tensor& t);
void check_same(const char* name, const Tensor& t, const Tensor& x);
void check_channel(const char* name, const Tensor& t, const Tensor& x);
void check_mask(const Tensor& mask, int64_t numel);

// A per-channel tensor read into doubles, of any dtype and stride; `missing` where there is none.
std::vector<double> read_channel(const OptionalTensor& t, int64_t channels, double missing);
// values written to a dense or strided per-channel tensor, in its dtype.
void write_channel(const Tensor& t, const std::vector<double>& values);

// Per-channel coefficients in the accumulation type, rounded once from double.
class Coefficients {
 public:
  Coefficients(const std::vector<double>& values, bool in_double);
  const void* data() const {
    return in_double_ ? static_cast<const void*>(doubles_.data())
                      : static_cast<const void*>(floats_.data());
  }

 private:
  bool in_double_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

// The operators (one file each).
std::tuple<Tensor, Tensor> add_relu_forward(Tensor x, Tensor residual, bool save_mask);
Tensor add_relu_backward(Tensor grad, Tensor mask, bool channels_last);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor running_mean, OptionalTensor running_var, bool training, double momentum,
    double eps, bool relu, bool save_mask);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mask, bool training, bool relu, std::vector<bool> output_mask);
std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor x);
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_reduce(Tensor grad, Tensor x,
                                                                  Tensor mean, Tensor invstd,
                                                                  OptionalTensor weight,
                                                                  OptionalTensor bias,
                                                                  OptionalTensor mask, bool relu);
Tensor batch_norm_act_backward_apply(Tensor masked, Tensor x, Tensor mean, Tensor invstd,
                                     OptionalTensor weight, Tensor sum, Tensor dot, double count);

}  // namespace resnet_fast
