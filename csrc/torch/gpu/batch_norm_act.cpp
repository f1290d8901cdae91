// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

namespace resnet_fast {

namespace {

// The running statistic as the kernel updates it, given back to the tensor where that was a copy.
void give_back(const OptionalTensor& updated, OptionalTensor& running) {
  if (running && updated->const_data_ptr() != running->const_data_ptr())
    torch::stable::copy_(*running, *updated);
}

// The launcher divides by one less than the number of values.
void check_count(const Tensor& x) {
  STD_TORCH_CHECK(x.numel() > x.size(1),
                  "Expected more than 1 value per channel when training, got input size ",
                  shape_text(x));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor running_mean, OptionalTensor running_var, bool training, double momentum,
    double eps, bool relu, bool save_mask) {
  const OnDevice device(x, "x");
  check_batch_norm_forward(x, weight, bias, residual, running_mean, running_var, training);
  if (training) check_count(x);
  BatchNormActParams p;
  p.dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  if (residual) residual = to_layout(*residual, channels_last);
  const OptionalTensor w = as_channel(weight, x), b = as_channel(bias, x);
  const OptionalTensor new_mean = as_channel(running_mean, x), new_var = as_channel(running_var, x);
  Tensor mean = new_channel(x), invstd = new_channel(x);
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = save_mask ? new_mask(x) : nothing(x, ScalarType::Byte);

  p.shape = shape_of(x, channels_last);
  p.x = x.const_data_ptr();
  p.residual = data_of(residual);
  p.y = y.mutable_data_ptr();
  p.mask = static_cast<uint8_t*>(data_if(save_mask, mask));
  p.weight = data_of(w);
  p.bias = data_of(b);
  p.running_mean = mutable_data_of(new_mean);
  p.running_var = mutable_data_of(new_var);
  p.mean = mean.mutable_data_ptr();
  p.invstd = invstd.mutable_data_ptr();
  p.training = training;
  p.relu = relu;
  p.momentum = momentum;
  p.eps = eps;
  const Tensor scratch = new_bytes(x, batch_norm_act_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  check_status(launch_batch_norm_act(p, device.stream()), "batch_norm_act_forward");
  if (training) {
    give_back(new_mean, running_mean);
    give_back(new_var, running_var);
  }
  return {y, mean, invstd, mask};
}

namespace {

// Gradients for checked arguments, those of weight and bias in the dtype `parameter`. With
// `overwrite` dx is written over grad, and its place in the result stays empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const OnDevice& device, const GradInput& in,
                                                    ScalarType parameter, bool training, bool relu,
                                                    const std::vector<bool>& output_mask,
                                                    bool overwrite) {
  const bool want_dx = output_mask[0], want_dresidual = output_mask[1];
  const bool want_dweight = output_mask[2], want_dbias = output_mask[3];
  const Tensor& x = in.x;
  const auto of_x = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(x) : nothing(x, x.scalar_type());
  };
  Tensor dx = overwrite && want_dx ? in.grad : of_x(want_dx), dresidual = of_x(want_dresidual);
  Tensor dweight = new_channel(x), dbias = new_channel(x);

  BatchNormActBackwardParams p;
  in.fill(&p);
  p.dx = data_if(want_dx, dx);
  p.dresidual = data_if(want_dresidual, dresidual);
  p.dweight = data_if(want_dweight, dweight);
  p.dbias = data_if(want_dbias, dbias);
  p.training = training;
  p.relu = relu;
  const Tensor scratch = new_bytes(x, batch_norm_act_backward_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  check_status(launch_batch_norm_act_backward(p, device.stream()), "batch_norm_act_backward");
  return {overwrite ? nothing(x, x.scalar_type()) : dx, dresidual,
          want_dweight ? as_type(dweight, parameter) : nothing(x, parameter),
          want_dbias ? as_type(dbias, parameter) : nothing(x, parameter)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mask, bool training, bool relu, std::vector<bool> output_mask) {
  const OnDevice device(x, "x");
  check_batch_norm_backward(grad, x, mean, invstd, weight, bias, mask, output_mask);
  return backward(device, {grad, x, mean, invstd, weight, bias, mask},
                  parameter_type(x, weight, bias), training, relu, output_mask, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mask, bool training, bool relu, std::vector<bool> output_mask) {
  const OnDevice device(x, "x");
  check_batch_norm_backward(grad, x, mean, invstd, weight, bias, mask, output_mask);
  check_overwrite(grad, x);
  return backward(device, {grad, x, mean, invstd, weight, bias, mask},
                  parameter_type(x, weight, bias), training, relu, output_mask, true);
}

}  // namespace resnet_fast
