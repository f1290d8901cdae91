// SPDX-License-Identifier: BSD-3-Clause
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "tensors.h"

namespace resnet_fast {

namespace {

using Values = std::vector<double>;

// Mean and biased variance of each channel of a dense x; the arrays hold one value a column.
void batch_statistics(const Tensor& x, const cpu::Geometry& geometry, cpu::DType dtype,
                      double* mean, double* var) {
  const auto [columns, repeat] = columns_of(geometry);
  cpu::kernels().bn_stats({x.const_data_ptr(), mean, var, columns, dtype}, torch_threads());
  if (repeat > 1) {
    // Columns of equal counts: their mean, and their deviations from it added to their own. Written
    // over columns that have been read.
    for (int64_t c = 0; c < geometry.channels; ++c) {
      const double *const means = mean + c * repeat, *const m2s = var + c * repeat;
      double total = 0, own = 0, between = 0;
      for (int64_t i = 0; i < repeat; ++i) total += means[i];
      total /= double(repeat);
      for (int64_t i = 0; i < repeat; ++i) {
        own += m2s[i];
        between += (means[i] - total) * (means[i] - total);
      }
      mean[c] = total;
      var[c] = own + double(geometry.rows) * between;
    }
  }
  for (int64_t c = 0; c < geometry.channels; ++c) var[c] /= double(geometry.count());
}

// running = (1 - momentum) * running + momentum * batch, the variance unbiased.
void update_running(const OptionalTensor& running, int64_t channels, const double* batch,
                    double momentum, double correction, double* values) {
  if (!running) return;
  read_channel(running, channels, 0, values);
  for (int64_t c = 0; c < channels; ++c) {
    values[c] = (1 - momentum) * values[c] + momentum * (batch[c] * correction);
  }
  write_channel(*running, channels, values);
}

Tensor channel_tensor(const Tensor& x, int64_t channels, const double* values, ScalarType type) {
  Tensor t = new_vector(x, channels, type);
  write_channel(t, channels, values);
  return t;
}

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// The forward for checked arguments. A: the accumulation type.
template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, bool channels_last, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double momentum, double eps, bool relu,
    bool save_mask) {
  const cpu::DType dtype = dtype_of(x, "x");
  const cpu::Geometry geometry = geometry_of(x, channels_last);
  const int64_t channels = geometry.channels;
  const auto [columns, repeat] = columns_of(geometry);
  ChannelArrays arrays(columns.channels, 6);
  double *const mean = arrays.take<double>(), *const var = arrays.take<double>();
  double* const values = arrays.take<double>();
  A *const centre = arrays.take<A>(), *const scale = arrays.take<A>();
  A* const shift = arrays.take<A>();
  if (training) {
    batch_statistics(x, geometry, dtype, mean, var);
  } else {
    read_channel(running_mean, channels, 0, mean);
    read_channel(running_var, channels, 1, var);
  }
  Tensor saved_mean = new_vector(x, channels, accumulate_type(x));
  Tensor saved_invstd = new_vector(x, channels, accumulate_type(x));
  A* const invstd = static_cast<A*>(saved_invstd.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    centre[c] = A(mean[c]);
    invstd[c] = A(1 / std::sqrt(var[c] + eps));
  }
  std::memcpy(saved_mean.mutable_data_ptr(), centre, size_t(channels) * sizeof(A));
  read_channel(weight, channels, 1, values);
  for (int64_t c = 0; c < channels; ++c) scale[c] = A(values[c] * double(invstd[c]));
  read_channel(bias, channels, 0, values);
  for (int64_t c = 0; c < channels; ++c) shift[c] = A(values[c]);
  for (A* const coefficients : {centre, scale, shift}) spread(coefficients, channels, repeat);

  Tensor y = new_like(x);
  Tensor mask = save_mask ? new_mask(x) : nothing(x, ScalarType::Byte);
  cpu::kernels().bn_apply({x.const_data_ptr(), data_or_null(residual), y.mutable_data_ptr(),
                           save_mask ? static_cast<uint16_t*>(mask.mutable_data_ptr()) : nullptr,
                           centre, scale, shift, columns, dtype, relu, too_large_for_cache(y)},
                          torch_threads());
  if (training) {
    const double n = double(geometry.count());
    update_running(running_mean, channels, mean, momentum, 1, values);
    update_running(running_var, channels, var, momentum, n > 1 ? n / (n - 1) : 1, values);
  }
  return {y, saved_mean, saved_invstd, mask};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor running_mean, OptionalTensor running_var, bool training, double momentum,
    double eps, bool relu, bool save_mask) {
  check_cpu("x", x);
  check_batch_norm_forward(x, weight, bias, residual, running_mean, running_var, training);
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  if (residual) residual = to_layout(*residual, channels_last);
  const auto run = dtype_of(x, "x") == cpu::DType::kFloat64 ? forward<double> : forward<float>;
  return run(x, channels_last, weight, bias, residual, running_mean, running_var, training,
             momentum, eps, relu, save_mask);
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

// The sums of each channel of those of its columns, written over columns that have been read.
void add_columns(double* sums, int64_t channels, int64_t repeat) {
  if (repeat == 1) return;
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t i = 0; i < repeat; ++i) total += sums[c * repeat + i];
    sums[c] = total;
  }
}

// Gradients for checked arguments, x and grad dense and of one layout. With `overwrite` dx is
// written over grad, and its place in the result stays empty. A: the accumulation type.
template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(
    const Tensor& grad, const Tensor& x, bool channels_last, const Tensor& mean,
    const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& mask, bool training, bool relu, const std::vector<bool>& output_mask,
    bool overwrite) {
  const bool want_dx = output_mask[0], want_dresidual = output_mask[1];
  const bool want_dweight = output_mask[2], want_dbias = output_mask[3];

  const cpu::DType dtype = dtype_of(x, "x");
  const cpu::Geometry geometry = geometry_of(x, channels_last);
  const int64_t channels = geometry.channels;
  const auto [columns, repeat] = columns_of(geometry);
  ChannelArrays arrays(columns.channels, 9);
  double *const sum = arrays.take<double>(), *const dot = arrays.take<double>();
  double *const inverse = arrays.take<double>(), *const values = arrays.take<double>();
  A *const centre = arrays.take<A>(), *const scale = arrays.take<A>();
  A *const shift = arrays.take<A>(), *const offset = arrays.take<A>();
  A* const slope = arrays.take<A>();
  read_channel(mean, channels, 0, values);
  for (int64_t c = 0; c < channels; ++c) centre[c] = A(values[c]);
  read_channel(invstd, channels, 0, inverse);
  read_channel(weight, channels, 1, values);
  for (int64_t c = 0; c < channels; ++c) scale[c] = A(values[c] * inverse[c]);
  read_channel(bias, channels, 0, values);
  for (int64_t c = 0; c < channels; ++c) shift[c] = A(values[c]);
  for (A* const coefficients : {centre, scale, shift}) spread(coefficients, channels, repeat);
  const auto source = mask_source(relu, mask);
  const auto* bits = mask ? static_cast<const uint16_t*>(mask->const_data_ptr()) : nullptr;

  const auto none = [&] { return nothing(x, x.scalar_type()); };
  Tensor dresidual = want_dresidual ? new_like(x) : none();
  void* masked = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  const bool reduce = want_dweight || want_dbias || (want_dx && training);
  const bool stream = too_large_for_cache(x);
  if (reduce) {
    cpu::kernels().bn_reduce({grad.const_data_ptr(), x.const_data_ptr(), bits, masked, centre,
                              scale, shift, sum, dot, columns, dtype, source, stream},
                             torch_threads());
    add_columns(sum, channels, repeat);
    add_columns(dot, channels, repeat);
  } else {
    for (int64_t c = 0; c < channels; ++c) sum[c] = dot[c] = 0;
  }
  // Once the masked gradient is written it is what the second pass reads.
  const bool behind_relu = reduce && want_dresidual;
  Tensor dx = !want_dx ? none() : (overwrite ? grad : new_like(x));
  if (want_dx || (want_dresidual && !reduce)) {
    const double n = double(geometry.count());
    for (int64_t c = 0; c < channels; ++c) {
      offset[c] = A(sum[c] / n);
      slope[c] = A(dot[c] * (inverse[c] * inverse[c] / n));
    }
    for (A* const coefficients : {offset, slope}) spread(coefficients, channels, repeat);
    cpu::kernels().bn_grad(
        {behind_relu ? masked : grad.const_data_ptr(), x.const_data_ptr(), bits,
         behind_relu ? nullptr : masked, want_dx ? dx.mutable_data_ptr() : nullptr, centre, scale,
         shift, training ? offset : nullptr, slope, columns, dtype,
         behind_relu ? cpu::MaskSource::kNone : source, stream},
        torch_threads());
  }
  const ScalarType parameter =
      weight ? weight->scalar_type() : (bias ? bias->scalar_type() : accumulate_type(x));
  for (int64_t c = 0; c < channels; ++c) dot[c] *= inverse[c];
  const auto made = [&](bool want, const double* of) {
    return want ? channel_tensor(x, channels, of, parameter) : nothing(x, parameter);
  };
  return {overwrite ? none() : dx, dresidual, made(want_dweight, dot), made(want_dbias, sum)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
    bool training, bool relu, const std::vector<bool>& output_mask, bool overwrite) {
  const bool channels_last = is_channels_last(x);
  const auto run = dtype_of(x, "x") == cpu::DType::kFloat64 ? gradients<double> : gradients<float>;
  return run(to_layout(grad, channels_last), to_layout(x, channels_last), channels_last, mean,
             invstd, weight, bias, mask, training, relu, output_mask, overwrite);
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
