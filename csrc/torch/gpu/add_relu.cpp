// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

namespace resnet_fast {

std::tuple<Tensor, Tensor> add_relu_forward(Tensor x, Tensor residual, bool save_mask) {
  const OnDevice device(x, "x");
  check_same("residual", residual, x);
  AddReluParams p;
  p.dtype = dtype_of(x, "x");
  const bool channels_last = is_channels_last(x);
  x = to_layout(x, channels_last);
  residual = to_layout(residual, channels_last);
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = save_mask ? new_mask(x) : nothing(x, ScalarType::Byte);
  p.elements = x.numel();
  p.x = x.const_data_ptr();
  p.residual = residual.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.mask = static_cast<uint8_t*>(data_if(save_mask, mask));
  check_status(launch_add_relu(p, device.stream()), "add_relu_forward");
  return {y, mask};
}

Tensor add_relu_backward(Tensor grad, Tensor mask, bool channels_last) {
  const OnDevice device(grad, "grad");
  check_mask(mask, grad);
  STD_TORCH_CHECK(!channels_last || grad.dim() == 4 || grad.dim() == 5,
                  "channels_last needs a grad of 4 or 5 dimensions; got ", shape_text(grad));
  AddReluBackwardParams p;
  p.dtype = dtype_of(grad, "grad");
  grad = to_layout(grad, channels_last);
  Tensor dx = torch::stable::empty_like(grad);
  p.elements = grad.numel();
  p.grad = grad.const_data_ptr();
  p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  p.dx = dx.mutable_data_ptr();
  check_status(launch_add_relu_backward(p, device.stream()), "add_relu_backward");
  return dx;
}

}  // namespace resnet_fast
