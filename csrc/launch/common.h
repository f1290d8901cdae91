// SPDX-License-Identifier: BSD-3-Clause
// What the launchers share: choice of the element type and the vector width.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/vec.cuh"
#include "launch/params.h"

namespace resnet_fast {

constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
constexpr std::size_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t elements_of(const Shape& shape) { return shape.n * shape.c * shape.inner; }

template <class... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<T>) with the element type of dtype.
template <class Function>
Status with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(TypeTag<double>{});
    case DType::kFloat32:
      return function(TypeTag<float>{});
    case DType::kFloat16:
      return function(TypeTag<half_t>{});
    case DType::kBFloat16:
      return function(TypeTag<bfloat16_t>{});
  }
  return {1, "unknown dtype"};
}

// Calls function(std::integral_constant<int, V>) with V the full vector width or 1.
template <class T, class Function>
Status with_vector(bool full, const Function& function) {
  if (full) return function(std::integral_constant<int, kVector<T>>{});
  return function(std::integral_constant<int, 1>{});
}

}  // namespace resnet_fast
