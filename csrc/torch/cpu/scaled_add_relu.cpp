// SPDX-License-Identifier: BSD-3-Clause
#include <type_traits>

#include "tensors.h"

namespace resnet_fast {

namespace {

void check_scale(const OptionalTensor& scale, const Tensor& x) {
  if (!scale) return;
  check_device("scale", *scale, x);
  STD_TORCH_CHECK(x.dim() >= 2,
                  "x must have 2 or more dimensions (N, C, *) for a scale of its own"
                  " for each channel; got ",
                  shape_text(x));
  STD_TORCH_CHECK(scale->dim() == 2 && scale->size(0) == x.size(0) && scale->size(1) == x.size(1) &&
                      scale->scalar_type() == x.scalar_type(),
                  "scale must have shape (", x.size(0), ", ", x.size(1), ") and dtype ",
                  torch::headeronly::toString(x.scalar_type()), "; got ", shape_text(*scale),
                  " and ", torch::headeronly::toString(scale->scalar_type()));
}

// The scales as the kernels read them: in the accumulation type, dense, and for planes of a few
// pixels written out to one for each pixel, each image being a run of C * pixels "channels".
class Scales {
 public:
  // x: dense. Without `scale` it is `factor` for all.
  Scales(const OptionalTensor& scale, double factor, const Tensor& x, bool channels_last) {
    const bool in_double = x.scalar_type() == ScalarType::Double;
    if (!scale) {
      hold({factor}, in_double, 1);
      params_ = {values_->data(), 1, 1, x.numel(), false};
      return;
    }
    const int64_t images = x.size(0), channels = x.size(1);
    const int64_t pixels = x.numel() / (images * channels);
    const bool small = !channels_last && columns_of({images, channels, pixels}).repeat > 1;
    repeat_ = small ? pixels : 1;
    params_ = {nullptr, images, channels * repeat_, small ? 1 : pixels,
               channels_last || small || pixels == 1};
    const Tensor dense = to_layout(*scale, false);
    if (repeat_ == 1 && scale->scalar_type() == accumulate_type(x)) {
      held_ = dense;
      params_.scale = held_->const_data_ptr();
      return;
    }
    const Tensor flat = torch::stable::view(dense, {images * channels});
    hold(read_channel(flat, images * channels, 0), in_double, repeat_);
    params_.scale = values_->data();
  }
  const cpu::ScaleParams& params() const { return params_; }
  int64_t repeat() const { return repeat_; }

 private:
  void hold(const std::vector<double>& values, bool in_double, int64_t repeat) {
    values_.emplace(values, in_double, repeat);
  }
  cpu::ScaleParams params_{};
  int64_t repeat_ = 1;
  std::optional<Coefficients> values_;
  OptionalTensor held_;
};

}  // namespace

std::tuple<Tensor, Tensor> scaled_add_relu_forward(Tensor x, Tensor residual, OptionalTensor scale,
                                                   double factor, bool save_mask) {
  check_cpu("x", x);
  check_same("residual", residual, x);
  check_scale(scale, x);
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty; got ", shape_text(x));
  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  residual = to_layout(residual, channels_last);
  const Scales scales(scale, factor, x, channels_last);
  Tensor y = new_like(x);
  Tensor mask = save_mask ? new_mask(x) : nothing(x, ScalarType::Byte);
  auto* const bits = save_mask ? static_cast<uint16_t*>(mask.mutable_data_ptr()) : nullptr;
  cpu::kernels().scaled_add_relu(
      {x.const_data_ptr(), residual.const_data_ptr(), y.mutable_data_ptr(), bits, scales.params(),
       dtype, too_large_for_cache(y)},
      torch_threads());
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> scaled_add_relu_backward(Tensor grad, OptionalTensor x,
                                                            OptionalTensor scale, double factor,
                                                            Tensor mask, bool channels_last,
                                                            std::vector<bool> output_mask) {
  check_cpu("grad", grad);
  check_mask(mask, grad);
  check_scale(scale, grad);
  STD_TORCH_CHECK(grad.numel() > 0, "grad must not be empty; got ", shape_text(grad));
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must have 3 entries; got ",
                  output_mask.size());
  STD_TORCH_CHECK(!channels_last || grad.dim() == 4 || grad.dim() == 5,
                  "channels_last needs a grad of 4 or 5 dimensions; got ", shape_text(grad));
  const bool want_dx = output_mask[0], want_dresidual = output_mask[1];
  const bool want_dscale = output_mask[2];
  STD_TORCH_CHECK(!want_dscale || (x && scale), "the gradient of scale needs x and scale");
  const cpu::DType dtype = dtype_of(grad, "grad");
  if (x) check_same("x", *x, grad);
  grad = to_layout(grad, channels_last);
  const Scales scales(scale, factor, grad, channels_last);
  const auto none = [&] { return nothing(grad, grad.scalar_type()); };
  Tensor dx = want_dx ? new_like(grad) : none();
  Tensor dresidual = want_dresidual ? new_like(grad) : none();
  if (want_dscale) x = to_layout(*x, channels_last);
  std::vector<double> sums;
  if (want_dscale) sums.resize(size_t(scales.params().images * scales.params().channels));
  cpu::kernels().scaled_add_relu_grad(
      {grad.const_data_ptr(), want_dscale ? x->const_data_ptr() : nullptr,
       static_cast<const uint16_t*>(mask.const_data_ptr()),
       want_dx ? dx.mutable_data_ptr() : nullptr,
       want_dresidual ? dresidual.mutable_data_ptr() : nullptr, want_dscale ? sums.data() : nullptr,
       scales.params(), dtype, too_large_for_cache(grad)},
      torch_threads());
  if (!want_dscale) return {dx, dresidual, none()};
  add_columns(sums, scales.repeat());
  Tensor dscale = new_vector(grad, int64_t(sums.size()), grad.scalar_type());
  write_channel(dscale, sums);
  return {dx, dresidual, torch::stable::view(dscale, {grad.size(0), grad.size(1)})};
}

}  // namespace resnet_fast
