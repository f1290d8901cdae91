// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of every device share: the operators' signatures, checks, layouts, the mask.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace resnet_fast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

ScalarType accumulate_type(const Tensor& x);
// Of the gradients of weight and bias.
ScalarType parameter_type(const Tensor& x, const OptionalTensor& weight,
                          const OptionalTensor& bias);
std::string shape_text(const Tensor& t);

// Dense in channels-last order (4-D, 5-D) and not contiguous as well.
bool is_channels_last(const Tensor& x);
// x itself where it is dense in that order, else a copy.
Tensor to_layout(const Tensor& x, bool channels_last);

// A new 1-D tensor of n elements on x's device.
Tensor new_vector(const Tensor& x, int64_t n, ScalarType type);
Tensor new_mask(const Tensor& x);
Tensor nothing(const Tensor& x, ScalarType type);
int64_t bytes_of_mask(int64_t numel);

void check_device(const char* name, const Tensor& t, const Tensor& x);
void check_same(const char* name, const Tensor& t, const Tensor& x);
void check_channel(const char* name, const Tensor& t, const Tensor& x);
void check_mask(const Tensor& mask, const Tensor& x);
// What the two batch-norm operators ask of their arguments, whatever the device.
void check_batch_norm_forward(const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              bool training);
void check_batch_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                               const Tensor& invstd, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mask,
                               const std::vector<bool>& output_mask);
// What dx written over grad asks in addition.
void check_overwrite(const Tensor& grad, const Tensor& x);
// What the phases ask: x dense or not, with values; `name`d grad of its kind, per-channel tensors.
void check_values(const Tensor& x);
void check_phase(const char* name, const Tensor& grad, const Tensor& x, const Tensor& mean,
                 const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias);

// The operators: one file each, in the folder of the device.
std::tuple<Tensor, Tensor> add_relu_forward(Tensor x, Tensor residual, bool save_mask);
Tensor add_relu_backward(Tensor grad, Tensor mask, bool channels_last);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor running_mean, OptionalTensor running_var, bool training, double momentum,
    double eps, bool relu, bool save_mask);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mask, bool training, bool relu, std::vector<bool> output_mask);
// The same with dx written over grad, if it is wanted, and empty in the result.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_(
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
