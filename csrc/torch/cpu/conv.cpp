// SPDX-License-Identifier: BSD-3-Clause
#include "conv.h"

#include <torch/csrc/stable/ops.h>

namespace resnet_fast {

void set_sliding(cpu::ConvParams& p, const Sliding& g) {
  for (const Pair* pair : {&g.kernel, &g.stride, &g.padding, &g.dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "kernel, stride, padding and dilation must be pairs");
  }
  const int64_t in[] = {p.in_h, p.in_w};
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(g.kernel[d] > 0 && g.stride[d] > 0 && g.dilation[d] > 0 && g.padding[d] >= 0,
                    "kernel, stride and dilation must be positive, padding not negative");
    const int64_t room = in[d] + 2 * g.padding[d] - g.dilation[d] * (g.kernel[d] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "x of ", in[0], " x ", in[1], " is smaller than the kernel");
    out[d] = room / g.stride[d] + 1;
  }
  p.kernel_h = g.kernel[0], p.kernel_w = g.kernel[1];
  p.stride_h = g.stride[0], p.stride_w = g.stride[1];
  p.pad_h = g.padding[0], p.pad_w = g.padding[1];
  p.dilation_h = g.dilation[0], p.dilation_w = g.dilation[1];
  p.out_h = out[0], p.out_w = out[1];
}

cpu::ConvParams pooled_sizes(cpu::ConvParams p, bool max_pool) {
  if (max_pool) p.out_h = (p.out_h - 1) / 2 + 1, p.out_w = (p.out_w - 1) / 2 + 1;
  return p;
}

void check_packed(const Tensor& weight, const cpu::ConvParams& p, int64_t taps) {
  const int64_t numel = taps * p.in_c * ((p.out_c + 63) / 64 * 64);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == numel,
                  "weight must be packed for this convolution, ", numel, " values; got ",
                  shape_text(weight));
}

bool is_rows(const Tensor& x) {
  int64_t stride = 1;
  for (int d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
  }
  return true;
}

Tensor to_rows(const Tensor& x) {
  if (is_rows(x)) return x;
  Tensor rows = new_rows(x.size(0), x.size(1), x.size(2), x.size(3), ScalarType::Float);
  return torch::stable::copy_(rows, x);
}

namespace {

void check_floats(const char* name, const Tensor& t) {
  check_cpu(name, t);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4, name,
                  " must be float32 of 4 dimensions (N, C, H, W); got ", shape_text(t));
}

// The sizes of a convolution of x, but for out_c.
cpu::ConvParams sizes_of(const Tensor& x, const Sliding& g) {
  cpu::ConvParams p{};
  p.n = x.size(0), p.in_c = x.size(1), p.in_h = x.size(2), p.in_w = x.size(3);
  set_sliding(p, g);
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

void check_outputs(const char* name, const Tensor& t, const cpu::ConvParams& p, const Tensor& x) {
  check_device(name, t, x);
  check_outputs(name, t, p);
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
    check_outputs("residual", *residual, p, x);
    added = to_rows(*residual);
  }
  const Tensor rows = to_rows(x);
  const Tensor y = new_rows(p.n, p.out_c, p.out_h, p.out_w, ScalarType::Float);
  if (p.n == 0) return y;
  set_pointers(p, rows, weight, bias, added ? &*added : nullptr, y);
  run();
  return y;
}

// The same, written to y, which also is the residual where its values are to be added.
template <class Kernel>
void into(cpu::ConvParams& p, Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& bias,
          bool add, const Kernel& run) {
  check_outputs("y", y, p, x);
  if (p.n == 0) return;
  const Tensor rows = to_rows(x), out = to_rows(y);
  set_pointers(p, rows, weight, bias, add ? &out : nullptr, out);
  run();
  if (!is_rows(y)) torch::stable::copy_(y, out);
}

void run_stem(cpu::ConvParams p, const Tensor& y, const Tensor& x, const Tensor& weight,
              const Tensor& bias, bool max_pool) {
  check_packed(weight, p, p.kernel_h * p.kernel_w);
  if (p.n == 0) return;
  const Tensor rows = to_rows(x);
  set_pointers(p, rows, weight, bias, nullptr, y);
  cpu::kernels().conv_stem(p, max_pool, torch_threads());
}

}  // namespace

Tensor conv_winograd(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual, Pair padding,
                     int64_t tile, bool relu) {
  cpu::ConvParams p = winograd_params(x, weight, bias, padding, tile, relu);
  return fresh(p, x, weight, bias, residual,
               [&] { cpu::kernels().conv_winograd(p, int(tile), torch_threads()); });
}

void conv_winograd_(Tensor y, Tensor x, Tensor weight, Tensor bias, bool add, Pair padding,
                    int64_t tile, bool relu) {
  cpu::ConvParams p = winograd_params(x, weight, bias, padding, tile, relu);
  into(p, y, x, weight, bias, add,
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

void conv_direct_(Tensor y, Tensor x, Tensor weight, Tensor bias, bool add, Pair kernel,
                  Pair stride, Pair padding, Pair dilation, bool relu) {
  cpu::ConvParams p = params_of(x, weight, bias, {kernel, stride, padding, dilation}, relu);
  check_packed(weight, p, p.kernel_h * p.kernel_w);
  into(p, y, x, weight, bias, add, [&] { cpu::kernels().conv_direct(p, torch_threads()); });
}

Tensor conv_stem(Tensor x, Tensor weight, Tensor bias, Pair kernel, Pair stride, Pair padding,
                 bool relu, bool max_pool) {
  const cpu::ConvParams p = params_of(x, weight, bias, {kernel, stride, padding}, relu);
  const cpu::ConvParams pooled = pooled_sizes(p, max_pool);
  const Tensor y = new_rows(p.n, p.out_c, pooled.out_h, pooled.out_w, ScalarType::Float);
  run_stem(p, y, x, weight, bias, max_pool);
  return y;
}

void conv_stem_(Tensor y, Tensor x, Tensor weight, Tensor bias, Pair kernel, Pair stride,
                Pair padding, bool relu, bool max_pool) {
  const cpu::ConvParams p = params_of(x, weight, bias, {kernel, stride, padding}, relu);
  check_outputs("y", y, pooled_sizes(p, max_pool), x);
  const Tensor out = to_rows(y);
  run_stem(p, out, x, weight, bias, max_pool);
  if (!is_rows(y)) torch::stable::copy_(y, out);
}

}  // namespace resnet_fast
