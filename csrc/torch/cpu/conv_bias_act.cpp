// SPDX-License-Identifier: BSD-3-Clause
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace resnet_fast {
namespace {

// A convolution's sizes and checks, for both operators.
cpu::ConvParams params_of(const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          int64_t tile, bool relu) {
  check_cpu("x", x);
  check_device("weight", weight, x);
  check_device("bias", bias, x);
  for (const Tensor* t : {&x, &weight, &bias}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "x, weight and bias must be float32");
  }
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W); got ", shape_text(x));
  for (const auto* pair : {&kernel, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "kernel, stride, padding and dilation must be pairs");
  }
  const auto out = [&](int64_t in, int d) {
    return (in + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  };
  cpu::ConvParams p{};
  p.n = x.size(0), p.in_c = x.size(1), p.in_h = x.size(2), p.in_w = x.size(3);
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 &&
                      p.dilation_h > 0 && p.dilation_w > 0 && p.pad_h >= 0 && p.pad_w >= 0,
                  "kernel, stride and dilation must be positive, padding not negative");
  p.out_c = bias.numel(), p.out_h = out(p.in_h, 0), p.out_w = out(p.in_w, 1);
  p.relu = relu;
  STD_TORCH_CHECK(p.out_h > 0 && p.out_w > 0, "x of ", shape_text(x),
                  " is smaller than the kernel");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.is_contiguous() && p.out_c > 0 && p.out_c % 16 == 0,
                  "bias must be dense, of a multiple of 16 channels; got ", shape_text(bias));
  STD_TORCH_CHECK(tile == 0 || tile == 2 || tile == 4, "tile must be 0, 2 or 4; got ", tile);
  const bool square = kernel[0] == 3 && kernel[1] == 3 && stride[0] == 1 && stride[1] == 1 &&
                      dilation[0] == 1 && dilation[1] == 1 && p.in_c % 16 == 0;
  STD_TORCH_CHECK(tile == 0 || square,
                  "tiles are for 3x3 kernels with stride 1 and a multiple of 16 input channels");
  const int64_t taps = tile ? (tile + 2) * (tile + 2) : kernel[0] * kernel[1];
  const int64_t numel = taps * p.in_c * ((p.out_c + 31) / 32 * 32);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == numel,
                  "weight must be packed for this convolution, ", numel, " values; got ",
                  shape_text(weight));
  return p;
}

void run(cpu::ConvParams& p, int64_t tile, const Tensor& x, const Tensor& weight,
         const Tensor& bias, const OptionalTensor& residual, const Tensor& y) {
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.residual = residual ? static_cast<const float*>(residual->const_data_ptr()) : nullptr;
  p.y = static_cast<float*>(y.mutable_data_ptr());
  if (tile == 0) {
    cpu::kernels().conv_direct(p, torch_threads());
  } else {
    cpu::kernels().conv_winograd(p, int(tile), torch_threads());
  }
}

void check_residual(const Tensor& residual, const cpu::ConvParams& p, const Tensor& x) {
  check_device("residual", residual, x);
  STD_TORCH_CHECK(residual.scalar_type() == ScalarType::Float && residual.dim() == 4 &&
                      residual.size(0) == p.n && residual.size(1) == p.out_c &&
                      residual.size(2) == p.out_h && residual.size(3) == p.out_w,
                  "residual must be float32 of shape (", p.n, ", ", p.out_c, ", ", p.out_h, ", ",
                  p.out_w, "); got ", shape_text(residual));
}

bool is_dense_rows(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(3) == x.size(1) && x.stride(2) == x.size(1) * x.size(3) &&
         x.stride(0) == x.size(1) * x.size(2) * x.size(3);
}

// Channels-last by its strides: is_channels_last asks for more, a tensor that is not contiguous,
// too.
Tensor to_rows(const Tensor& x) {
  if (is_dense_rows(x)) return x;
  Tensor rows = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), x.size(1)});
  rows = torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
  return torch::stable::copy_(rows, x);
}

}  // namespace

Tensor conv_bias_act(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual,
                     std::vector<int64_t> kernel, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t tile,
                     bool relu) {
  cpu::ConvParams p = params_of(x, weight, bias, kernel, stride, padding, dilation, tile, relu);
  if (residual) {
    check_residual(*residual, p, x);
    residual = to_rows(*residual);
  }
  const Tensor rows = torch::stable::new_empty(x, {p.n, p.out_h, p.out_w, p.out_c});
  const Tensor y = torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
  if (p.n > 0) run(p, tile, to_rows(x), weight, bias, residual, y);
  return y;
}

void conv_bias_act_(Tensor residual, Tensor x, Tensor weight, Tensor bias,
                    std::vector<int64_t> kernel, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t tile,
                    bool relu) {
  cpu::ConvParams p = params_of(x, weight, bias, kernel, stride, padding, dilation, tile, relu);
  check_residual(residual, p, x);
  if (p.n == 0) return;
  Tensor y = to_rows(residual);
  run(p, tile, to_rows(x), weight, bias, y, y);
  if (!is_dense_rows(residual)) torch::stable::copy_(residual, y);
}

}  // namespace resnet_fast
