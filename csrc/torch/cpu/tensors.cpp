// SPDX-License-Identifier: BSD-3-Clause
#include "tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resnet_fast {

namespace {

constexpr int64_t kHugePage = int64_t(2) << 20;
constexpr int64_t kHugeFrom = 2 * kHugePage;
// Pixels of a plane that is walked faster as so many channels of one pixel each.
constexpr int64_t kSmallPlane = 15;
// Of the order of a last-level cache: below it the next operation finds the output there.
constexpr int64_t kStreamFrom = int64_t(16) << 20;

int64_t bytes_of(const Tensor& x) { return x.numel() * int64_t(x.element_size()); }

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // A hint: a system without huge pages refuses it, and nothing is lost.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

template <class Visit>
void for_channel_dtype(const Tensor& t, const Visit& visit) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::Float:
      return visit(float{});
    case ScalarType::Half:
      return visit(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return visit(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "per-channel tensors must be floating, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

}  // namespace

cpu::Parallel torch_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {int64_t(threads), run_parallel};
}

cpu::DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return cpu::DType::kFloat64;
    case ScalarType::Float:
      return cpu::DType::kFloat32;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

cpu::Geometry geometry_of(const Tensor& x, bool channels_last) {
  const int64_t channels = x.size(1);
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  if (channels_last || pixels == 1) return {x.size(0) * pixels, channels, 1};
  return {x.size(0), channels, pixels};
}

Columns columns_of(const cpu::Geometry& g) {
  const bool small = g.inner > 1 && g.inner <= kSmallPlane;
  if (!small) return {g, 1};
  return {{g.rows, g.channels * g.inner, 1}, g.inner};
}

Tensor new_like(const Tensor& x) {
  // NOTE: not torch::stable::empty_like: that looks its operator up by name at every call.
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &made));
  return on_huge_pages(Tensor(made));
}

Tensor new_rows(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) {
  const int64_t sizes[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return on_huge_pages(Tensor(made));
}

Tensor on_huge_pages(Tensor fresh) {
  const int64_t bytes = bytes_of(fresh);
  if (bytes >= kHugeFrom) advise_huge_pages(fresh.mutable_data_ptr(), bytes);
  return fresh;
}

void huge_pages(Tensor fresh) {
  check_cpu("fresh", fresh);
  on_huge_pages(fresh);
}

bool too_large_for_cache(const Tensor& x) { return bytes_of(x) >= kStreamFrom; }

void check_cpu(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, as x is");
}

std::vector<double> read_channel(const OptionalTensor& t, int64_t channels, double missing) {
  std::vector<double> values(channels, missing);
  if (!t) return values;
  for_channel_dtype(*t, [&](auto zero) {
    const auto* p = static_cast<const decltype(zero)*>(t->const_data_ptr());
    const int64_t stride = t->stride(0);
    for (int64_t c = 0; c < channels; ++c) values[c] = double(p[c * stride]);
  });
  return values;
}

void write_channel(const Tensor& t, const std::vector<double>& values) {
  for_channel_dtype(t, [&](auto zero) {
    using T = decltype(zero);
    T* const p = static_cast<T*>(t.mutable_data_ptr());
    const int64_t stride = t.stride(0);
    for (size_t c = 0; c < values.size(); ++c) p[c * stride] = T(values[c]);
  });
}

Tensor channel_tensor(const Tensor& x, const std::vector<double>& values, ScalarType type) {
  Tensor t = new_vector(x, int64_t(values.size()), type);
  write_channel(t, values);
  return t;
}

std::vector<double> scale_of(const std::vector<double>& invstd, const OptionalTensor& weight) {
  std::vector<double> scale = read_channel(weight, int64_t(invstd.size()), 1);
  for (size_t c = 0; c < scale.size(); ++c) scale[c] *= invstd[c];
  return scale;
}

void add_columns(std::vector<double>& sums, int64_t repeat) {
  if (repeat == 1) return;
  const size_t channels = sums.size() / size_t(repeat);
  for (size_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t i = 0; i < repeat; ++i) total += sums[c * size_t(repeat) + size_t(i)];
    sums[c] = total;
  }
  sums.resize(channels);
}

namespace {

template <class A>
void repeat_each(const std::vector<double>& values, int64_t repeat, std::vector<A>& out) {
  if (repeat == 1) {
    out.assign(values.begin(), values.end());
    return;
  }
  out.reserve(values.size() * size_t(repeat));
  for (const double value : values) out.insert(out.end(), size_t(repeat), A(value));
}

}  // namespace

Coefficients::Coefficients(const std::vector<double>& values, bool in_double, int64_t repeat)
    : in_double_(in_double) {
  if (in_double) {
    repeat_each(values, repeat, doubles_);
  } else {
    repeat_each(values, repeat, floats_);
  }
}

}  // namespace resnet_fast
