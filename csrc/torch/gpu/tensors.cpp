// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

#if !defined(RF_EMULATE)
// NOTE: weak, so that the module also loads beside a PyTorch without CUDA: CI builds and loads it
// there. libtorch.so, which the module is linked with, brings the symbol where there is CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace resnet_fast {

#if defined(RF_EMULATE)

OnDevice::OnDevice(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, where the emulator runs");
}

#else

OnDevice::OnDevice(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this PyTorch was built without CUDA");
  guard_.emplace(x.get_device_index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
}

#endif

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

Shape shape_of(const Tensor& x, bool channels_last) {
  int64_t inner = 1;
  for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
  return {x.size(0), x.size(1), inner, channels_last ? Layout::kChannelsLast : Layout::kContiguous};
}

Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, std::optional<ScalarType>(type));
}

Tensor as_channel(const Tensor& t, const Tensor& x) {
  const Tensor values = as_type(t, accumulate_type(x));
  return values.is_contiguous() ? values : torch::stable::contiguous(values);
}

OptionalTensor as_channel(const OptionalTensor& t, const Tensor& x) {
  if (!t) return std::nullopt;
  return as_channel(*t, x);
}

Tensor new_channel(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(1)}, accumulate_type(x));
}

Tensor new_bytes(const Tensor& x, std::size_t bytes) {
  return torch::stable::new_empty(x, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
void* mutable_data_of(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }
void* data_if(bool wanted, const Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

GradInput::GradInput(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                     const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& mask)
    : channels_last(is_channels_last(x)),
      grad(to_layout(grad, channels_last)),
      x(to_layout(x, channels_last)),
      mean(as_channel(mean, x)),
      invstd(as_channel(invstd, x)),
      weight(as_channel(weight, x)),
      bias(as_channel(bias, x)),
      mask(mask) {}

void GradInput::fill(BatchNormGradInput* p) const {
  p->dtype = dtype_of(x, "x");
  p->shape = shape_of(x, channels_last);
  p->grad = grad.const_data_ptr();
  p->x = x.const_data_ptr();
  p->mean = mean.const_data_ptr();
  p->invstd = invstd.const_data_ptr();
  p->weight = data_of(weight);
  p->bias = data_of(bias);
  p->mask = static_cast<const uint8_t*>(data_of(mask));
}

void check_status(const Status& status, const char* op) {
  STD_TORCH_CHECK(status.ok(), op, ": the kernel was not launched: ", status.message, " (code ",
                  status.code, ")");
}

}  // namespace resnet_fast
