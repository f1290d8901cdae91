// SPDX-License-Identifier: BSD-3-Clause
// The phases of batch_norm_act, between which a synchronised form communicates
// (resnet_fast/synchronised.py). What crosses the line is in float64, (C,).
#include "tensors.h"

namespace resnet_fast {

namespace {

using Values = std::vector<double>;

Tensor double_tensor(const Tensor& x, const Values& values) {
  Tensor t = torch::stable::new_empty(x, {int64_t(values.size())}, ScalarType::Double);
  write_channel(t, values);
  return t;
}

// What both phases of the backward are given: x and the gradient in one layout, coefficients.
struct Backward {
  cpu::DType dtype;
  Tensor x, grad;
  cpu::Geometry geometry;
  Values invstd;
  Coefficients mean, scale, bias;

  static Backward of(const char* name, const Tensor& grad, const Tensor& x, const Tensor& mean,
                     const Tensor& invstd, const OptionalTensor& weight,
                     const OptionalTensor& bias) {
    check_cpu("x", x);
    check_phase(name, grad, x, mean, invstd, weight, bias);
    const cpu::DType dtype = dtype_of(x, "x");
    const bool in_double = dtype == cpu::DType::kFloat64;
    const bool channels_last = is_channels_last(x);
    const Tensor dense = to_layout(x, channels_last);
    const int64_t channels = x.size(1);
    const Values inverse = read_channel(invstd, channels, 0);
    return {dtype,
            dense,
            to_layout(grad, channels_last),
            geometry_of(dense, channels_last),
            inverse,
            Coefficients(read_channel(mean, channels, 0), in_double),
            Coefficients(scale_of(inverse, weight), in_double),
            Coefficients(read_channel(bias, channels, 0), in_double)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor x) {
  check_cpu("x", x);
  check_values(x);
  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  Values mean(x.size(1)), m2(x.size(1));
  cpu::kernels().bn_stats(
      {x.const_data_ptr(), mean.data(), m2.data(), geometry_of(x, channels_last), dtype},
      torch_threads());
  return {double_tensor(x, mean), double_tensor(x, m2)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_reduce(Tensor grad, Tensor x,
                                                                  Tensor mean, Tensor invstd,
                                                                  OptionalTensor weight,
                                                                  OptionalTensor bias,
                                                                  OptionalTensor mask, bool relu) {
  const Backward b = Backward::of("grad", grad, x, mean, invstd, weight, bias);
  if (mask) check_mask(*mask, x);
  const auto source = mask_source(relu, mask);
  const auto* bits = mask ? static_cast<const uint16_t*>(mask->const_data_ptr()) : nullptr;
  Tensor masked = relu ? new_like(b.x) : nothing(x, x.scalar_type());
  Values sum(x.size(1)), dot(x.size(1));
  cpu::kernels().bn_reduce(
      {b.grad.const_data_ptr(), b.x.const_data_ptr(), bits,
       relu ? masked.mutable_data_ptr() : nullptr, b.mean.data(), b.scale.data(), b.bias.data(),
       sum.data(), dot.data(), b.geometry, b.dtype, source, too_large_for_cache(b.x)},
      torch_threads());
  return {masked, double_tensor(x, sum), double_tensor(x, dot)};
}

Tensor batch_norm_act_backward_apply(Tensor masked, Tensor x, Tensor mean, Tensor invstd,
                                     OptionalTensor weight, Tensor sum, Tensor dot, double count) {
  const Backward b = Backward::of("masked", masked, x, mean, invstd, weight, std::nullopt);
  check_channel("sum", sum, x);
  check_channel("dot", dot, x);
  const bool in_double = b.dtype == cpu::DType::kFloat64;
  Values offset = read_channel(sum, x.size(1), 0), slope = read_channel(dot, x.size(1), 0);
  for (double& v : offset) v /= count;
  for (size_t c = 0; c < slope.size(); ++c) slope[c] *= b.invstd[c] * b.invstd[c] / count;
  const Coefficients offsets(offset, in_double), slopes(slope, in_double);
  Tensor dx = new_like(b.x);
  cpu::kernels().bn_grad(
      {b.grad.const_data_ptr(), b.x.const_data_ptr(), nullptr, nullptr, dx.mutable_data_ptr(),
       b.mean.data(), b.scale.data(), b.bias.data(), offsets.data(), slopes.data(), b.geometry,
       b.dtype, cpu::MaskSource::kNone, too_large_for_cache(b.x)},
      torch_threads());
  return dx;
}

}  // namespace resnet_fast
