// SPDX-License-Identifier: BSD-3-Clause
// What the kernel tests share: checks, exact-size buffers, conversion to double.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/vec.cuh"
#include "launch/common.h"
#include "launch/params.h"

namespace resnet_fast::test {

// Counts a case; a failed one prints one line.
void check(bool ok, const std::string& what);
int failures();
int cases();

void test_emulator();
void test_add_relu();
void test_batch_norm();
void test_phases();
void test_traffic();
void test_more_traffic();

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"float64", "float32", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}
// Distance from 1 to the next value.
inline double epsilon(DType dtype) {
  static const double values[] = {0x1p-52, 0x1p-23, 0x1p-10, 0x1p-7};
  return values[static_cast<int>(dtype)];
}
// Half the distance between the smallest numbers.
inline double smallest(DType dtype) { return dtype == DType::kFloat16 ? 0x1p-25 : 1e-40; }
// Of the type that arithmetic is done in.
inline double accumulator_epsilon(DType dtype) {
  return dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
}

// A heap block of exactly the bytes asked for, `shift` bytes past a 16-byte boundary, so that
// AddressSanitizer sees the first byte beyond it. Starts as NaN.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes = 0, std::size_t shift = 0)
      : memory_(new (std::align_val_t{16}) char[bytes + shift]), bytes_(bytes), shift_(shift) {
    std::memset(memory_.get(), 0xff, bytes + shift);
  }
  void* data() { return memory_.get() + shift_; }
  std::size_t bytes() const { return bytes_; }
  std::string copy() const { return std::string(memory_.get() + shift_, bytes_); }

 private:
  struct Free {
    void operator()(char* memory) const { operator delete[](memory, std::align_val_t{16}); }
  };
  std::unique_ptr<char[], Free> memory_;
  std::size_t bytes_, shift_;
};

// Values of a dtype in a Buffer, read and written as double.
class Tensor {
 public:
  Tensor(DType dtype, int64_t size, bool misaligned = false)
      : dtype_(dtype),
        size_(size),
        buffer_(size * size_of(dtype), misaligned ? size_of(dtype) : 0) {}
  void* data() { return buffer_.data(); }
  int64_t size() const { return size_; }
  std::string bytes() const { return buffer_.copy(); }
  double get(int64_t i) const {
    double value;
    convert(false, i, &value);
    return value;
  }
  std::vector<double> values() const {
    std::vector<double> result(size_);
    for (int64_t i = 0; i < size_; ++i) result[i] = get(i);
    return result;
  }
  void set(int64_t i, double value) { convert(true, i, &value); }
  void fill_normal(uint64_t seed, double mean = 0, double deviation = 1);

 private:
  template <class T>
  void convert_as(bool set, int64_t i, double* value) const {
    T* element = static_cast<T*>(const_cast<Tensor*>(this)->data()) + i;
    if (set) {
      *element = rounded<T>(static_cast<Accumulator<T>>(*value));
    } else {
      *value = to_accumulator(*element);
    }
  }
  void convert(bool set, int64_t i, double* value) const {
    switch (dtype_) {
      case DType::kFloat64:
        return convert_as<double>(set, i, value);
      case DType::kFloat32:
        return convert_as<float>(set, i, value);
      case DType::kFloat16:
        return convert_as<half_t>(set, i, value);
      case DType::kBFloat16:
        return convert_as<bfloat16_t>(set, i, value);
    }
  }

  DType dtype_;
  int64_t size_;
  Buffer buffer_;
};

inline DType accumulator_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
inline bool mask_bit(const uint8_t* mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

}  // namespace resnet_fast::test
