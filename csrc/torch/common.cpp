// SPDX-License-Identifier: BSD-3-Clause
#include "common.h"

namespace resnet_fast {

ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

ScalarType parameter_type(const Tensor& x, const OptionalTensor& weight,
                          const OptionalTensor& bias) {
  if (weight) return weight->scalar_type();
  return bias ? bias->scalar_type() : accumulate_type(x);
}

std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

bool is_channels_last(const Tensor& x) {
  const int64_t dim = x.dim();
  if ((dim != 4 && dim != 5) || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t k = 0; k < dim; ++k) {
    const int64_t d = k == 0 ? 1 : (k < dim - 1 ? dim - k : 0);  // C, W, H, [D,] N
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

Tensor to_layout(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (!channels_last) return x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (is_channels_last(x)) return x;
  return torch::stable::contiguous(
      x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

int64_t bytes_of_mask(int64_t numel) { return 2 * ((numel + 15) / 16); }

Tensor new_vector(const Tensor& x, int64_t n, ScalarType type) {
  // NOTE: not torch::stable::new_empty: that looks its operator up by name at every call.
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int64_t stride = 1;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &n, &stride, dtype, device_type, device_index, &made));
  return Tensor(made);
}

Tensor new_mask(const Tensor& x) {
  return new_vector(x, bytes_of_mask(x.numel()), ScalarType::Byte);
}

Tensor nothing(const Tensor& x, ScalarType type) { return new_vector(x, 0, type); }

void check_device(const char* name, const Tensor& t, const Tensor& x) {
  // Indices matter among GPUs; the CPU's is -1 or 0, as the tensor was made.
  const bool same = x.is_cpu() ? t.is_cpu() : !t.is_cpu() && t.get_device() == x.get_device();
  STD_TORCH_CHECK(same, name, " must be on x's device");
}

void check_same(const char* name, const Tensor& t, const Tensor& x) {
  check_device(name, t, x);
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " must have x's shape ", shape_text(x), " and dtype ",
                  torch::headeronly::toString(x.scalar_type()), "; got ", shape_text(t), " and ",
                  torch::headeronly::toString(t.scalar_type()));
}

void check_channel(const char* name, const Tensor& t, const Tensor& x) {
  check_device(name, t, x);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(1), name, " must have shape (", x.size(1),
                  ",); got ", shape_text(t));
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float ||
                      type == ScalarType::Half || type == ScalarType::BFloat16,
                  name, " must be of a floating dtype; got ", torch::headeronly::toString(type));
}

void check_mask(const Tensor& mask, const Tensor& x) {
  const int64_t numel = x.numel();
  check_device("mask", mask, x);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.dim() == 1 &&
                      mask.numel() == bytes_of_mask(numel) && mask.is_contiguous(),
                  "mask must be a 1-D uint8 tensor of ", bytes_of_mask(numel), " bytes for ", numel,
                  " elements; got ", torch::headeronly::toString(mask.scalar_type()), " of shape ",
                  shape_text(mask));
}

void check_batch_norm_forward(const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              bool training) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must have 2 or more dimensions (N, C, *); got ", shape_text(x));
  if (weight) check_channel("weight", *weight, x);
  if (bias) check_channel("bias", *bias, x);
  if (running_mean) check_channel("running_mean", *running_mean, x);
  if (running_var) check_channel("running_var", *running_var, x);
  if (residual) check_same("residual", *residual, x);
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "running_mean and running_var must be given when training is False");
  STD_TORCH_CHECK(!training || x.numel() > 0, "x must not be empty when training; got ",
                  shape_text(x));
}

void check_batch_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                               const Tensor& invstd, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mask,
                               const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must have 2 or more dimensions (N, C, *); got ", shape_text(x));
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty; got ", shape_text(x));
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask must have 4 entries; got ",
                  output_mask.size());
  check_same("grad", grad, x);
  check_channel("mean", mean, x);
  check_channel("invstd", invstd, x);
  if (weight) check_channel("weight", *weight, x);
  if (bias) check_channel("bias", *bias, x);
  if (mask) check_mask(*mask, x);
}

void check_overwrite(const Tensor& grad, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(grad.size(d) == 1 || grad.stride(d) == x.stride(d),
                    "grad must have x's strides to be overwritten; it has another in dimension ",
                    d);
  }
  STD_TORCH_CHECK(x.is_contiguous() || is_channels_last(x),
                  "x must be dense, contiguous or channels-last, for grad to be overwritten");
}

void check_values(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must have 2 or more dimensions (N, C, *); got ", shape_text(x));
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty; got ", shape_text(x));
}

void check_phase(const char* name, const Tensor& grad, const Tensor& x, const Tensor& mean,
                 const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias) {
  check_values(x);
  check_same(name, grad, x);
  check_channel("mean", mean, x);
  check_channel("invstd", invstd, x);
  if (weight) check_channel("weight", *weight, x);
  if (bias) check_channel("bias", *bias, x);
}

}  // namespace resnet_fast
