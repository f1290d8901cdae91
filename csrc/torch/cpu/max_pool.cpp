// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

namespace resnet_fast {

namespace {

int64_t pooled(int64_t size) { return (size - 1) / 2 + 1; }

void check_pictures(const char* name, const Tensor& t) {
  check_cpu(name, t);
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions (N, C, H, W); got ", shape_text(t));
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool_forward(Tensor x, bool save_place) {
  check_pictures("x", x);
  const cpu::DType dtype = dtype_of(x, "x");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(h > 0 && w > 0, "x must have pixels; got ", shape_text(x));
  x = to_layout(x, true);
  const Tensor y = new_rows(n, c, pooled(h), pooled(w), x.scalar_type());
  const Tensor place = save_place ? new_rows(n, c, pooled(h), pooled(w), ScalarType::Byte)
                                  : nothing(x, ScalarType::Byte);
  cpu::kernels().max_pool({x.const_data_ptr(), y.mutable_data_ptr(),
                           save_place ? static_cast<uint8_t*>(place.mutable_data_ptr()) : nullptr,
                           n, c, h, w, pooled(h), pooled(w), dtype},
                          torch_threads());
  return {y, place};
}

Tensor max_pool_backward(Tensor grad, Tensor place, int64_t height, int64_t width) {
  check_pictures("grad", grad);
  check_device("place", place, grad);
  const cpu::DType dtype = dtype_of(grad, "grad");
  const int64_t n = grad.size(0), c = grad.size(1), out_h = grad.size(2), out_w = grad.size(3);
  STD_TORCH_CHECK(height > 0 && width > 0 && pooled(height) == out_h && pooled(width) == out_w,
                  "height and width must be those of the pictures that were pooled to ",
                  shape_text(grad), "; got ", height, " and ", width);
  STD_TORCH_CHECK(
      place.scalar_type() == ScalarType::Byte && place.dim() == 4 && place.size(0) == n &&
          place.size(1) == c && place.size(2) == out_h && place.size(3) == out_w,
      "place must be uint8 of grad's shape ", shape_text(grad), "; got ", shape_text(place));
  grad = to_layout(grad, true), place = to_layout(place, true);
  const Tensor dx = new_rows(n, c, height, width, grad.scalar_type());
  cpu::kernels().max_pool_grad(
      {grad.const_data_ptr(), static_cast<const uint8_t*>(place.const_data_ptr()),
       dx.mutable_data_ptr(), n, c, height, width, out_h, out_w, dtype, too_large_for_cache(dx)},
      torch_threads());
  return dx;
}

}  // namespace resnet_fast
