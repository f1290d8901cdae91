// SPDX-License-Identifier: BSD-3-Clause
#include "grad_input.h"

namespace resnet_fast {

namespace {

using Values = std::vector<double>;

cpu::MaskSource mask_source(bool relu, const OptionalTensor& mask) {
  if (!relu) return cpu::MaskSource::kNone;
  return mask ? cpu::MaskSource::kBits : cpu::MaskSource::kRecompute;
}

}  // namespace

GradInput::GradInput(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                     const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& mask, bool relu, bool by_columns)
    : dtype_(dtype_of(x, "x")),
      in_double_(dtype_ == cpu::DType::kFloat64),
      channels_last_(is_channels_last(x)),
      grad_(to_layout(grad, channels_last_)),
      x_(to_layout(x, channels_last_)),
      geometry_(geometry_of(x_, channels_last_)),
      columns_(by_columns ? columns_of(geometry_) : Columns{geometry_, 1}),
      invstd_(read_channel(invstd, geometry_.channels, 0)),
      mean_(read_channel(mean, geometry_.channels, 0), in_double_, columns_.repeat),
      scale_(scale_of(invstd_, weight), in_double_, columns_.repeat),
      bias_(read_channel(bias, geometry_.channels, 0), in_double_, columns_.repeat),
      source_(mask_source(relu, mask)),
      bits_(mask ? static_cast<const uint16_t*>(mask->const_data_ptr()) : nullptr),
      stream_(too_large_for_cache(x_)) {}

GradSums GradInput::reduce(void* masked) const {
  GradSums sums{Values(columns_.geometry.channels), Values(columns_.geometry.channels)};
  cpu::kernels().bn_reduce(
      {grad_.const_data_ptr(), x_.const_data_ptr(), bits_, masked, mean_.data(), scale_.data(),
       bias_.data(), sums.sum.data(), sums.dot.data(), columns_.geometry, dtype_, source_, stream_},
      torch_threads());
  add_columns(sums.sum, columns_.repeat);
  add_columns(sums.dot, columns_.repeat);
  return sums;
}

void GradInput::apply(const GradSums* sums, double count, const void* g, void* masked,
                      void* dx) const {
  Values offset, slope;
  if (sums) {
    offset = sums->sum;
    slope = sums->dot;
    for (double& v : offset) v /= count;
    for (size_t c = 0; c < slope.size(); ++c) slope[c] *= invstd_[c] * invstd_[c] / count;
  }
  const Coefficients offsets(offset, in_double_, columns_.repeat),
      slopes(slope, in_double_, columns_.repeat);
  cpu::kernels().bn_grad({g ? g : grad_.const_data_ptr(), x_.const_data_ptr(), bits_,
                          g ? nullptr : masked, dx, mean_.data(), scale_.data(), bias_.data(),
                          sums ? offsets.data() : nullptr, sums ? slopes.data() : nullptr,
                          columns_.geometry, dtype_, g ? cpu::MaskSource::kNone : source_, stream_},
                         torch_threads());
}

}  // namespace resnet_fast
