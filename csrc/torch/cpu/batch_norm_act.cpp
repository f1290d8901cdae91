// SPDX-License-Identifier: BSD-3-Clause
#include <cmath>
#include <memory>
#include <type_traits>

#include "tensors.h"

namespace resnet_fast {

namespace {

using Values = std::vector<double>;

struct Statistics {
  Values mean;
  Values var;  // biased
};

Statistics batch_statistics(const Tensor& x, const cpu::Geometry& geometry, cpu::DType dtype) {
  const auto [columns, repeat] = columns_of(geometry);
  Statistics s{Values(columns.channels), Values(columns.channels)};
  cpu::kernels().bn_stats({x.const_data_ptr(), s.mean.data(), s.var.data(), columns, dtype},
                          torch_threads());
  if (repeat > 1) {
    // Columns of equal counts: their mean, and their deviations from it added to their own.
    for (int64_t c = 0; c < geometry.channels; ++c) {
      const double *const means = &s.mean[c * repeat], *const m2s = &s.var[c * repeat];
      double mean = 0, own = 0, between = 0;
      for (int64_t i = 0; i < repeat; ++i) mean += means[i];
      mean /= double(repeat);
      for (int64_t i = 0; i < repeat; ++i) {
        own += m2s[i];
        between += (means[i] - mean) * (means[i] - mean);
      }
      s.mean[c] = mean;
      s.var[c] = own + double(geometry.rows) * between;
    }
    s.mean.resize(geometry.channels);
    s.var.resize(geometry.channels);
  }
  for (double& v : s.var) v /= double(geometry.count());
  return s;
}

// running = (1 - momentum) * running + momentum * batch, the variance unbiased.
void update_running(const OptionalTensor& running, const Values& batch, double momentum,
                    double correction) {
  if (!running) return;
  Values values = read_channel(running, int64_t(batch.size()), 0);
  for (size_t c = 0; c < values.size(); ++c) {
    values[c] = (1 - momentum) * values[c] + momentum * (batch[c] * correction);
  }
  write_channel(*running, values);
}

Tensor channel_tensor(const Tensor& x, const Values& values, ScalarType type) {
  Tensor t = new_vector(x, int64_t(values.size()), type);
  write_channel(t, values);
  return t;
}

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor running_mean, OptionalTensor running_var, bool training, double momentum,
    double eps, bool relu, bool save_mask) {
  check_cpu("x", x);
  check_batch_norm_forward(x, weight, bias, residual, running_mean, running_var, training);
  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  if (residual) residual = to_layout(*residual, channels_last);
  const cpu::Geometry geometry = geometry_of(x, channels_last);
  const bool in_double = dtype == cpu::DType::kFloat64;

  Statistics s = training ? batch_statistics(x, geometry, dtype)
                          : Statistics{read_channel(running_mean, geometry.channels, 0),
                                       read_channel(running_var, geometry.channels, 1)};
  Values invstd(s.var);
  for (double& v : invstd) v = 1 / std::sqrt(v + eps);
  Tensor saved_mean = channel_tensor(x, s.mean, accumulate_type(x));
  Tensor saved_invstd = channel_tensor(x, invstd, accumulate_type(x));
  const auto [columns, repeat] = columns_of(geometry);
  const Coefficients mean(s.mean, in_double, repeat);
  const Coefficients scale(scale_of(read_channel(saved_invstd, geometry.channels, 0), weight),
                           in_double, repeat);
  const Coefficients shift(read_channel(bias, geometry.channels, 0), in_double, repeat);

  Tensor y = new_like(x);
  Tensor mask = save_mask ? new_mask(x) : nothing(x, ScalarType::Byte);
  cpu::kernels().bn_apply(
      {x.const_data_ptr(), data_or_null(residual), y.mutable_data_ptr(),
       save_mask ? static_cast<uint16_t*>(mask.mutable_data_ptr()) : nullptr, mean.data(),
       scale.data(), shift.data(), columns, dtype, relu, too_large_for_cache(y)},
      torch_threads());
  if (training) {
    const double n = double(geometry.count());
    update_running(running_mean, s.mean, momentum, 1);
    update_running(running_var, s.var, momentum, n > 1 ? n / (n - 1) : 1);
  }
  return {y, saved_mean, saved_invstd, mask};
}

namespace {

// What inference multiplies with and adds, (3, C, repeat): mean, scale and shift, rounded as in the
// forward that saves them. P: the parameters' type; A: the accumulation type.
template <class A, class P>
std::unique_ptr<A[]> fold(int64_t channels, int64_t repeat, const P* weight, const P* bias,
                          const P* mean, const P* var, double eps) {
  std::unique_ptr<A[]> folded(new A[3 * channels * repeat]);
  A *const means = folded.get(), *const scales = means + channels * repeat;
  A* const shifts = scales + channels * repeat;
  for (int64_t c = 0; c < channels; ++c) {
    const A invstd = A(1 / std::sqrt(double(var[c]) + eps));
    const A scale = weight ? A(double(weight[c]) * double(invstd)) : invstd;
    const A shift = bias ? A(bias[c]) : A(0);
    for (int64_t i = c * repeat; i < (c + 1) * repeat; ++i) {
      means[i] = A(mean[c]);
      scales[i] = scale;
      shifts[i] = shift;
    }
  }
  return folded;
}

template <class A>
std::unique_ptr<A[]> folded_of(int64_t channels, int64_t repeat, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                               double eps) {
  const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const auto ready = [&](const Tensor& t) { return t.scalar_type() == type && t.stride(0) == 1; };
  if (ready(mean) && ready(var) && (!weight || ready(*weight)) && (!bias || ready(*bias))) {
    const auto data = [](const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); };
    return fold<A, A>(channels, repeat, weight ? data(*weight) : nullptr,
                      bias ? data(*bias) : nullptr, data(mean), data(var), eps);
  }
  const Values weights = read_channel(weight, channels, 1),
               shifts = read_channel(bias, channels, 0);
  return fold<A, double>(channels, repeat, weights.data(), shifts.data(),
                         read_channel(mean, channels, 0).data(),
                         read_channel(var, channels, 1).data(), eps);
}

}  // namespace

Tensor batch_norm_act_inference(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                OptionalTensor residual, Tensor running_mean, Tensor running_var,
                                double eps, bool relu) {
  check_cpu("x", x);
  check_batch_norm_forward(x, weight, bias, residual, running_mean, running_var, false);
  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  if (residual) residual = to_layout(*residual, channels_last);
  const int64_t channels = x.size(1);
  const auto [columns, repeat] = columns_of(geometry_of(x, channels_last));
  Tensor y = new_like(x);
  const auto apply = [&](const auto* folded) {
    const int64_t n = channels * repeat;
    cpu::kernels().bn_apply(
        {x.const_data_ptr(), data_or_null(residual), y.mutable_data_ptr(), nullptr, folded,
         folded + n, folded + 2 * n, columns, dtype, relu, too_large_for_cache(y)},
        torch_threads());
  };
  if (dtype == cpu::DType::kFloat64) {
    apply(folded_of<double>(channels, repeat, weight, bias, running_mean, running_var, eps).get());
  } else {
    apply(folded_of<float>(channels, repeat, weight, bias, running_mean, running_var, eps).get());
  }
  return y;
}

namespace {

// Gradients for checked arguments. With `overwrite` dx is written over grad, and its place in the
// result stays empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mask, bool training, bool relu,
    const std::vector<bool>& output_mask, bool overwrite) {
  const bool want_dx = output_mask[0], want_dresidual = output_mask[1];
  const bool want_dweight = output_mask[2], want_dbias = output_mask[3];

  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  grad = to_layout(grad, channels_last);
  const cpu::Geometry geometry = geometry_of(x, channels_last);
  const bool in_double = dtype == cpu::DType::kFloat64;
  const int64_t channels = geometry.channels;
  const Values mean_values = read_channel(mean, channels, 0);
  const Values invstd_values = read_channel(invstd, channels, 0);
  const Values scale_values = scale_of(invstd_values, weight);
  const auto [columns, repeat] = columns_of(geometry);
  const Coefficients centre(mean_values, in_double, repeat), scale(scale_values, in_double, repeat),
      shift(read_channel(bias, channels, 0), in_double, repeat);
  const auto source = mask_source(relu, mask);
  const auto* bits = mask ? static_cast<const uint16_t*>(mask->const_data_ptr()) : nullptr;

  const auto none = [&] { return nothing(x, x.scalar_type()); };
  Tensor dresidual = want_dresidual ? new_like(x) : none();
  void* masked = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  Values sum(columns.channels), dot(columns.channels);
  const bool reduce = want_dweight || want_dbias || (want_dx && training);
  const bool stream = too_large_for_cache(x);
  if (reduce) {
    cpu::kernels().bn_reduce(
        {grad.const_data_ptr(), x.const_data_ptr(), bits, masked, centre.data(), scale.data(),
         shift.data(), sum.data(), dot.data(), columns, dtype, source, stream},
        torch_threads());
  }
  add_columns(sum, repeat);
  add_columns(dot, repeat);
  // Once the masked gradient is written it is what the second pass reads.
  const bool behind_relu = reduce && want_dresidual;
  Tensor dx = !want_dx ? none() : (overwrite ? grad : new_like(x));
  if (want_dx || (want_dresidual && !reduce)) {
    Values offset(sum), slope(dot);
    const double n = double(geometry.count());
    for (double& v : offset) v /= n;
    for (int64_t c = 0; c < channels; ++c) slope[c] *= invstd_values[c] * invstd_values[c] / n;
    const Coefficients offsets(offset, in_double, repeat), slopes(slope, in_double, repeat);
    cpu::kernels().bn_grad(
        {behind_relu ? masked : grad.const_data_ptr(), x.const_data_ptr(), bits,
         behind_relu ? nullptr : masked, want_dx ? dx.mutable_data_ptr() : nullptr, centre.data(),
         scale.data(), shift.data(), training ? offsets.data() : nullptr, slopes.data(), columns,
         dtype, behind_relu ? cpu::MaskSource::kNone : source, stream},
        torch_threads());
  }
  const ScalarType parameter =
      weight ? weight->scalar_type() : (bias ? bias->scalar_type() : accumulate_type(x));
  for (int64_t c = 0; c < channels; ++c) dot[c] *= invstd_values[c];
  Tensor dweight = want_dweight ? channel_tensor(x, dot, parameter) : nothing(x, parameter);
  Tensor dbias = want_dbias ? channel_tensor(x, sum, parameter) : nothing(x, parameter);
  return {overwrite ? none() : dx, dresidual, dweight, dbias};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mask, bool training, bool relu, std::vector<bool> output_mask) {
  check_cpu("x", x);
  check_batch_norm_backward(grad, x, mean, invstd, weight, bias, mask, output_mask);
  return backward(grad, x, mean, invstd, weight, bias, mask, training, relu, output_mask, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mask, bool training, bool relu, std::vector<bool> output_mask) {
  check_cpu("x", x);
  check_batch_norm_backward(grad, x, mean, invstd, weight, bias, mask, output_mask);
  check_overwrite(grad, x);
  return backward(grad, x, mean, invstd, weight, bias, mask, training, relu, output_mask, true);
}

}  // namespace resnet_fast
