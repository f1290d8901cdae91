// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

namespace resnet_fast {

namespace {

Tensor forward(Tensor x, Tensor residual, uint16_t* mask) {
  const cpu::DType dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  residual = to_layout(residual, channels_last);
  Tensor y = new_like(x);
  cpu::kernels().add_relu({x.const_data_ptr(), residual.const_data_ptr(), y.mutable_data_ptr(),
                           mask, x.numel(), dtype, too_large_for_cache(y)},
                          torch_threads());
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor> add_relu_forward(Tensor x, Tensor residual, bool save_mask) {
  check_cpu("x", x);
  check_same("residual", residual, x);
  Tensor mask = save_mask ? new_mask(x) : nothing(x, ScalarType::Byte);
  auto* const bits = save_mask ? static_cast<uint16_t*>(mask.mutable_data_ptr()) : nullptr;
  return {forward(x, residual, bits), mask};
}

Tensor add_relu_inference(Tensor x, Tensor residual) {
  check_cpu("x", x);
  check_same("residual", residual, x);
  return forward(x, residual, nullptr);
}

Tensor add_relu_backward(Tensor grad, Tensor mask, bool channels_last) {
  check_cpu("grad", grad);
  check_mask(mask, grad);
  STD_TORCH_CHECK(!channels_last || grad.dim() == 4 || grad.dim() == 5,
                  "channels_last needs a grad of 4 or 5 dimensions; got ", shape_text(grad));
  const cpu::DType dtype = dtype_of(grad, "grad");
  grad = to_layout(grad, channels_last);
  Tensor dx = new_like(grad);
  cpu::kernels().masked_grad(
      {grad.const_data_ptr(), static_cast<const uint16_t*>(mask.const_data_ptr()),
       dx.mutable_data_ptr(), grad.numel(), dtype, too_large_for_cache(dx)},
      torch_threads());
  return dx;
}

}  // namespace resnet_fast
