// SPDX-License-Identifier: BSD-3-Clause
// The phases of batch_norm_act, between which a synchronised form communicates
// (resnet_fast/synchronised.py). What crosses the line is in float64, (C,).
#include "tensors.h"

namespace resnet_fast {

namespace {

Tensor new_double(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(1)}, ScalarType::Double);
}
double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor x) {
  const OnDevice device(x, "x");
  check_values(x);
  BatchNormStatisticsParams p;
  p.dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  Tensor mean = new_double(x), m2 = new_double(x);
  p.shape = shape_of(x, channels_last);
  p.x = x.const_data_ptr();
  p.mean = doubles(mean);
  p.m2 = doubles(m2);
  const Tensor scratch = new_bytes(x, batch_norm_statistics_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  check_status(launch_batch_norm_statistics(p, device.stream()), "batch_norm_statistics");
  return {mean, m2};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_reduce(Tensor grad, Tensor x,
                                                                  Tensor mean, Tensor invstd,
                                                                  OptionalTensor weight,
                                                                  OptionalTensor bias,
                                                                  OptionalTensor mask, bool relu) {
  const OnDevice device(x, "x");
  check_phase("grad", grad, x, mean, invstd, weight, bias);
  if (mask) check_mask(*mask, x);
  const GradInput in(grad, x, mean, invstd, weight, bias, mask);
  Tensor masked = relu ? torch::stable::empty_like(in.x) : nothing(x, x.scalar_type());
  Tensor sum = new_double(x), dot = new_double(x);
  BatchNormActBackwardReduceParams p;
  in.fill(&p);
  p.masked = data_if(relu, masked);
  p.sum = doubles(sum);
  p.dot = doubles(dot);
  p.relu = relu;
  const Tensor scratch = new_bytes(x, batch_norm_act_backward_reduce_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  check_status(launch_batch_norm_act_backward_reduce(p, device.stream()),
               "batch_norm_act_backward_reduce");
  return {masked, sum, dot};
}

Tensor batch_norm_act_backward_apply(Tensor masked, Tensor x, Tensor mean, Tensor invstd,
                                     OptionalTensor weight, Tensor sum, Tensor dot, double count) {
  const OnDevice device(x, "x");
  check_phase("masked", masked, x, mean, invstd, weight, std::nullopt);
  check_channel("sum", sum, x);
  check_channel("dot", dot, x);
  const GradInput in(masked, x, mean, invstd, weight, std::nullopt, std::nullopt);
  // Their last rounding, to float32, is of the order of the sums' own.
  sum = as_channel(sum, x);
  dot = as_channel(dot, x);
  Tensor dx = torch::stable::empty_like(in.x);
  BatchNormActBackwardApplyParams p;
  in.fill(&p);
  p.sum = sum.const_data_ptr();
  p.dot = dot.const_data_ptr();
  p.count = count;
  p.dx = dx.mutable_data_ptr();
  check_status(launch_batch_norm_act_backward_apply(p, device.stream()),
               "batch_norm_act_backward_apply");
  return dx;
}

}  // namespace resnet_fast
