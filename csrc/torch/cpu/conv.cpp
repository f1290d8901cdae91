// SPDX-License-Identifier: BSD-3-Clause
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace resnet_fast {
namespace {

using Pair = std::vector<int64_t>;

// Sizes and checks that the convolutions share; out_h, out_w and the weights are left to fill in.
cpu::ConvParams params_of(const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const Pair& kernel, const Pair& stride, const Pair& padding, bool relu) {
  check_cpu("x", x);
  check_device("weight", weight, x);
  check_device("bias", bias, x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float &&
                      weight.scalar_type() == ScalarType::Float &&
                      bias.scalar_type() == ScalarType::Float,
                  "x, weight and bias must be float32");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W); got ", shape_text(x));
  for (const Pair* pair : {&kernel, &stride, &padding}) {
    STD_TORCH_CHECK(pair->size() == 2, "kernel, stride and padding must be pairs");
  }
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && padding[d] >= 0,
                    "kernel and stride must be positive, padding not negative");
    STD_TORCH_CHECK(x.size(d + 2) + 2 * padding[d] >= kernel[d], "x of ", shape_text(x),
                    " is smaller than the kernel");
  }
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.is_contiguous() && bias.numel() > 0 && bias.numel() % 16 == 0,
      "bias must be dense, of a multiple of 16 channels; got ", shape_text(bias));
  cpu::ConvParams p{};
  p.n = x.size(0), p.in_c = x.size(1), p.in_h = x.size(2), p.in_w = x.size(3);
  p.kernel_h = kernel[0], p.kernel_w = kernel[1];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.out_c = bias.numel();
  p.out_h = (p.in_h + 2 * p.pad_h - p.kernel_h) / p.stride_h + 1;
  p.out_w = (p.in_w + 2 * p.pad_w - p.kernel_w) / p.stride_w + 1;
  p.relu = relu;
  return p;
}

// taps: how many matrices of (C_in, C_out) the packed weights hold.
void check_packed(const Tensor& weight, const cpu::ConvParams& p, int64_t taps) {
  const int64_t numel = taps * p.in_c * ((p.out_c + 31) / 32 * 32);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == numel,
                  "weight must be packed for this convolution, ", numel, " values; got ",
                  shape_text(weight));
}

cpu::ConvParams winograd_params(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                const Pair& padding, int64_t tile, bool relu) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4; got ", tile);
  cpu::ConvParams p = params_of(x, weight, bias, {3, 3}, {1, 1}, padding, relu);
  STD_TORCH_CHECK(p.in_c % 16 == 0, "x must have a multiple of 16 channels; got ", p.in_c);
  check_packed(weight, p, (tile + 2) * (tile + 2));
  return p;
}

void check_residual(const Tensor& residual, const cpu::ConvParams& p, const Tensor& x) {
  check_device("residual", residual, x);
  STD_TORCH_CHECK(residual.scalar_type() == ScalarType::Float && residual.dim() == 4 &&
                      residual.size(0) == p.n && residual.size(1) == p.out_c &&
                      residual.size(2) == p.out_h && residual.size(3) == p.out_w,
                  "residual must be float32 of shape (", p.n, ", ", p.out_c, ", ", p.out_h, ", ",
                  p.out_w, "); got ", shape_text(residual));
}

bool is_rows(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(3) == x.size(1) && x.stride(2) == x.size(1) * x.size(3) &&
         x.stride(0) == x.size(1) * x.size(2) * x.size(3);
}

// (n, c, h, w) with channels-last strides, whatever the sizes are.
Tensor new_rows(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Tensor rows = torch::stable::new_empty(x, {n, h, w, c});
  return torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
}

Tensor to_rows(const Tensor& x) {
  if (is_rows(x)) return x;
  Tensor rows = new_rows(x, x.size(0), x.size(1), x.size(2), x.size(3));
  return torch::stable::copy_(rows, x);
}

// Pointers filled in; x and the residual must be rows and outlive the call.
void set_pointers(cpu::ConvParams& p, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Tensor* residual, const Tensor& y) {
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.residual = residual ? static_cast<const float*>(residual->const_data_ptr()) : nullptr;
  p.y = static_cast<float*>(y.mutable_data_ptr());
}

}  // namespace

Tensor conv_winograd(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual, Pair padding,
                     int64_t tile, bool relu) {
  cpu::ConvParams p = winograd_params(x, weight, bias, padding, tile, relu);
  if (residual) {
    check_residual(*residual, p, x);
    residual = to_rows(*residual);
  }
  x = to_rows(x);
  const Tensor y = new_rows(x, p.n, p.out_c, p.out_h, p.out_w);
  if (p.n == 0) return y;
  set_pointers(p, x, weight, bias, residual ? &*residual : nullptr, y);
  cpu::kernels().conv_winograd(p, int(tile), torch_threads());
  return y;
}

void conv_winograd_(Tensor residual, Tensor x, Tensor weight, Tensor bias, Pair padding,
                    int64_t tile, bool relu) {
  cpu::ConvParams p = winograd_params(x, weight, bias, padding, tile, relu);
  check_residual(residual, p, x);
  if (p.n == 0) return;
  x = to_rows(x);
  const Tensor y = to_rows(residual);
  set_pointers(p, x, weight, bias, &y, y);
  cpu::kernels().conv_winograd(p, int(tile), torch_threads());
  if (!is_rows(residual)) torch::stable::copy_(residual, y);
}

Tensor conv_stem(Tensor x, Tensor weight, Tensor bias, Pair kernel, Pair stride, Pair padding,
                 bool relu, bool max_pool) {
  cpu::ConvParams p = params_of(x, weight, bias, kernel, stride, padding, relu);
  check_packed(weight, p, p.kernel_h * p.kernel_w);
  x = to_rows(x);
  const auto pooled = [&](int64_t size) { return max_pool ? (size - 1) / 2 + 1 : size; };
  const Tensor y = new_rows(x, p.n, p.out_c, pooled(p.out_h), pooled(p.out_w));
  if (p.n == 0) return y;
  set_pointers(p, x, weight, bias, nullptr, y);
  cpu::kernels().conv_stem(p, max_pool, torch_threads());
  return y;
}

}  // namespace resnet_fast
