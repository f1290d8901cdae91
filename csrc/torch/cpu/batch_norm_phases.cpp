// SPDX-License-Identifier: BSD-3-Clause
// The phases of batch_norm_act, between which a synchronised form communicates
// (resnet_fast/synchronised.py). What crosses the line is in float64, (C,).
#include "grad_input.h"

namespace resnet_fast {

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor x) {
  check_cpu("x", x);
  check_values(x);
  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  std::vector<double> mean(x.size(1)), m2(x.size(1));
  cpu::kernels().bn_stats(
      {x.const_data_ptr(), mean.data(), m2.data(), geometry_of(x, channels_last), dtype},
      torch_threads());
  return {channel_tensor(x, mean, ScalarType::Double), channel_tensor(x, m2, ScalarType::Double)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_reduce(Tensor grad, Tensor x,
                                                                  Tensor mean, Tensor invstd,
                                                                  OptionalTensor weight,
                                                                  OptionalTensor bias,
                                                                  OptionalTensor mask, bool relu) {
  check_cpu("x", x);
  check_phase("grad", grad, x, mean, invstd, weight, bias);
  if (mask) check_mask(*mask, x);
  const GradInput in(grad, x, mean, invstd, weight, bias, mask, relu, false);
  Tensor masked = relu ? new_like(in.x()) : nothing(x, x.scalar_type());
  const GradSums sums = in.reduce(relu ? masked.mutable_data_ptr() : nullptr);
  return {masked, channel_tensor(x, sums.sum, ScalarType::Double),
          channel_tensor(x, sums.dot, ScalarType::Double)};
}

Tensor batch_norm_act_backward_apply(Tensor masked, Tensor x, Tensor mean, Tensor invstd,
                                     OptionalTensor weight, Tensor sum, Tensor dot, double count) {
  check_cpu("x", x);
  check_phase("masked", masked, x, mean, invstd, weight, std::nullopt);
  check_channel("sum", sum, x);
  check_channel("dot", dot, x);
  const GradInput in(masked, x, mean, invstd, weight, std::nullopt, std::nullopt, false, false);
  const GradSums sums{read_channel(sum, x.size(1), 0), read_channel(dot, x.size(1), 0)};
  Tensor dx = new_like(in.x());
  in.apply(&sums, count, nullptr, nullptr, dx.mutable_data_ptr());
  return dx;
}

}  // namespace resnet_fast
