// SPDX-License-Identifier: BSD-3-Clause
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace resnet_fast {
namespace {

using Pair = std::vector<int64_t>;

void check_floats(const char* name, const Tensor& t) {
  check_cpu(name, t);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4, name,
                  " must be float32 of 4 dimensions (N, C, H, W); got ", shape_text(t));
}

// How a kernel goes over a picture; each of two numbers, down and across.
struct Sliding {
  Pair kernel, stride, padding, dilation{1, 1};
};

// The sizes of a convolution of x, but for out_c.
cpu::ConvParams sizes_of(const Tensor& x, const Sliding& g) {
  for (const Pair* pair : {&g.kernel, &g.stride, &g.padding, &g.dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "kernel, stride, padding and dilation must be pairs");
  }
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(g.kernel[d] > 0 && g.stride[d] > 0 && g.dilation[d] > 0 && g.padding[d] >= 0,
                    "kernel, stride and dilation must be positive, padding not negative");
    STD_TORCH_CHECK(x.size(d + 2) + 2 * g.padding[d] > g.dilation[d] * (g.kernel[d] - 1), "x of ",
                    shape_text(x), " is smaller than the kernel");
  }
  cpu::ConvParams p{};
  p.n = x.size(0), p.in_c = x.size(1), p.in_h = x.size(2), p.in_w = x.size(3);
  p.kernel_h = g.kernel[0], p.kernel_w = g.kernel[1];
  p.stride_h = g.stride[0], p.stride_w = g.stride[1];
  p.pad_h = g.padding[0], p.pad_w = g.padding[1];
  p.dilation_h = g.dilation[0], p.dilation_w = g.dilation[1];
  p.out_h = (p.in_h + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_w = (p.in_w + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  return p;
}

// Sizes and checks that the convolutions of packed weights share.
cpu::ConvParams params_of(const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const Sliding& sliding, bool relu) {
  check_floats("x", x);
  check_device("weight", weight, x);
  check_device("bias", bias, x);
  STD_TORCH_CHECK(
      weight.scalar_type() == ScalarType::Float && bias.scalar_type() == ScalarType::Float,
      "x, weight and bias must be float32");
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.is_contiguous() && bias.numel() > 0 && bias.numel() % 16 == 0,
      "bias must be dense, of a multiple of 16 channels; got ", shape_text(bias));
  cpu::ConvParams p = sizes_of(x, sliding);
  STD_TORCH_CHECK(p.in_c > 0, "x must have channels; got ", shape_text(x));
  p.out_c = bias.numel();
  p.relu = relu;
  return p;
}

// taps: how many matrices of (C_in, C_out) the packed weights hold.
void check_packed(const Tensor& weight, const cpu::ConvParams& p, int64_t taps) {
  const int64_t numel = taps * p.in_c * ((p.out_c + 63) / 64 * 64);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == numel,
                  "weight must be packed for this convolution, ", numel, " values; got ",
                  shape_text(weight));
}

cpu::ConvParams winograd_params(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                const Pair& padding, int64_t tile, bool relu) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4; got ", tile);
  cpu::ConvParams p = params_of(x, weight, bias, {{3, 3}, {1, 1}, padding}, relu);
  STD_TORCH_CHECK(p.in_c % 16 == 0, "x must have a multiple of 16 channels; got ", p.in_c);
  check_packed(weight, p, (tile + 2) * (tile + 2));
  return p;
}

// Of the shape of the convolution's outputs.
void check_outputs(const char* name, const Tensor& t, const cpu::ConvParams& p) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4 && t.size(0) == p.n &&
                      t.size(1) == p.out_c && t.size(2) == p.out_h && t.size(3) == p.out_w,
                  name, " must be float32 of shape (", p.n, ", ", p.out_c, ", ", p.out_h, ", ",
                  p.out_w, "); got ", shape_text(t));
}

void check_residual(const Tensor& residual, const cpu::ConvParams& p, const Tensor& x) {
  check_device("residual", residual, x);
  check_outputs("residual", residual, p);
}

bool is_rows(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(3) == x.size(1) && x.stride(2) == x.size(1) * x.size(3) &&
         x.stride(0) == x.size(1) * x.size(2) * x.size(3);
}

Tensor to_rows(const Tensor& x) {
  if (is_rows(x)) return x;
  Tensor rows = new_rows(x.size(0), x.size(1), x.size(2), x.size(3), ScalarType::Float);
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

// The outputs, in a new tensor; run: the kernel, on p.
template <class Kernel>
Tensor fresh(cpu::ConvParams& p, const Tensor& x, const Tensor& weight, const Tensor& bias,
             const OptionalTensor& residual, const Kernel& run) {
  OptionalTensor added;
  if (residual) {
    check_residual(*residual, p, x);
    added = to_rows(*residual);
  }
  const Tensor rows = to_rows(x);
  const Tensor y = new_rows(p.n, p.out_c, p.out_h, p.out_w, ScalarType::Float);
  if (p.n == 0) return y;
  set_pointers(p, rows, weight, bias, added ? &*added : nullptr, y);
  run();
  return y;
}

// The same, written over the residual.
template <class Kernel>
void onto(cpu::ConvParams& p, Tensor& residual, const Tensor& x, const Tensor& weight,
          const Tensor& bias, const Kernel& run) {
  check_residual(residual, p, x);
  if (p.n == 0) return;
  const Tensor rows = to_rows(x), y = to_rows(residual);
  set_pointers(p, rows, weight, bias, &y, y);
  run();
  if (!is_rows(residual)) torch::stable::copy_(residual, y);
}

}  // namespace

Tensor conv_winograd(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual, Pair padding,
                     int64_t tile, bool relu) {
  cpu::ConvParams p = winograd_params(x, weight, bias, padding, tile, relu);
  return fresh(p, x, weight, bias, residual,
               [&] { cpu::kernels().conv_winograd(p, int(tile), torch_threads()); });
}

void conv_winograd_(Tensor residual, Tensor x, Tensor weight, Tensor bias, Pair padding,
                    int64_t tile, bool relu) {
  cpu::ConvParams p = winograd_params(x, weight, bias, padding, tile, relu);
  onto(p, residual, x, weight, bias,
       [&] { cpu::kernels().conv_winograd(p, int(tile), torch_threads()); });
}

Tensor conv_winograd_pack(Tensor weight, int64_t tile, bool transposed) {
  check_cpu("weight", weight);
  STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4; got ", tile);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 4 &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  "weight must be float32 of shape (C_out, C_in, 3, 3); got ", shape_text(weight));
  if (weight.stride(2) != 3 * weight.stride(3)) weight = to_rows(weight);
  const int rows = transposed ? 0 : 1, columns = 1 - rows;
  cpu::FilterParams p{};
  p.rows = weight.size(rows), p.columns = weight.size(columns);
  STD_TORCH_CHECK(p.rows > 0 && p.columns > 0 && p.columns % 16 == 0,
                  "weight must have a multiple of 16 channels in dimension ", columns, "; got ",
                  shape_text(weight));
  p.row_stride = weight.stride(rows), p.column_stride = weight.stride(columns);
  p.tap_stride = weight.stride(3);
  p.flip = transposed;
  const int64_t points = (tile + 2) * (tile + 2), panels = (p.columns + 63) / 64;
  const Tensor packed =
      on_huge_pages(torch::stable::new_empty(weight, {points, panels, p.rows, 64}));
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.packed = static_cast<float*>(packed.mutable_data_ptr());
  cpu::kernels().conv_winograd_pack(p, int(tile), torch_threads());
  return packed;
}

Tensor conv_winograd_weight(Tensor grad, Tensor x, Pair padding, int64_t tile) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4; got ", tile);
  check_floats("x", x);
  check_floats("grad", grad);
  check_device("grad", grad, x);
  cpu::ConvParams p = sizes_of(x, {{3, 3}, {1, 1}, padding});
  p.out_c = grad.size(1);
  check_outputs("grad", grad, p);
  STD_TORCH_CHECK(p.in_c > 0 && p.out_c > 0 && p.in_c % 16 == 0 && p.out_c % 16 == 0,
                  "x and grad must have a multiple of 16 channels; got ", p.in_c, " and ", p.out_c);
  const Tensor weight = new_rows(p.out_c, p.in_c, 3, 3, ScalarType::Float);
  if (p.n == 0) return torch::stable::zero_(const_cast<Tensor&>(weight));
  x = to_rows(x), grad = to_rows(grad);
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.y = static_cast<float*>(const_cast<void*>(grad.const_data_ptr()));
  cpu::kernels().conv_winograd_weight(p, static_cast<float*>(weight.mutable_data_ptr()), int(tile),
                                      torch_threads());
  return weight;
}

Tensor conv_direct(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual, Pair kernel,
                   Pair stride, Pair padding, Pair dilation, bool relu) {
  cpu::ConvParams p = params_of(x, weight, bias, {kernel, stride, padding, dilation}, relu);
  check_packed(weight, p, p.kernel_h * p.kernel_w);
  return fresh(p, x, weight, bias, residual,
               [&] { cpu::kernels().conv_direct(p, torch_threads()); });
}

void conv_direct_(Tensor residual, Tensor x, Tensor weight, Tensor bias, Pair kernel, Pair stride,
                  Pair padding, Pair dilation, bool relu) {
  cpu::ConvParams p = params_of(x, weight, bias, {kernel, stride, padding, dilation}, relu);
  check_packed(weight, p, p.kernel_h * p.kernel_w);
  onto(p, residual, x, weight, bias, [&] { cpu::kernels().conv_direct(p, torch_threads()); });
}

Tensor conv_stem(Tensor x, Tensor weight, Tensor bias, Pair kernel, Pair stride, Pair padding,
                 bool relu, bool max_pool) {
  cpu::ConvParams p = params_of(x, weight, bias, {kernel, stride, padding}, relu);
  check_packed(weight, p, p.kernel_h * p.kernel_w);
  x = to_rows(x);
  const auto pooled = [&](int64_t size) { return max_pool ? (size - 1) / 2 + 1 : size; };
  const Tensor y = new_rows(p.n, p.out_c, pooled(p.out_h), pooled(p.out_w), ScalarType::Float);
  if (p.n == 0) return y;
  set_pointers(p, x, weight, bias, nullptr, y);
  cpu::kernels().conv_stem(p, max_pool, torch_threads());
  return y;
}

}  // namespace resnet_fast
