// SPDX-License-Identifier: BSD-3-Clause
// Between tensors and the CPU kernels' parameters: outputs, coefficients, threads.
#pragma once

#include <memory>
#include <utility>

#include "../../cpu/params.h"
#include "../common.h"

namespace resnet_fast {

// PyTorch's own threads.
cpu::Parallel torch_threads();

cpu::DType dtype_of(const Tensor& x, const char* name);
cpu::Geometry geometry_of(const Tensor& x, bool channels_last);

// Planes (N, C, H, W) of a few pixels are shorter than a vector: there a channel's pixels go as
// columns of their own, each with its channel's coefficients, `repeat` columns a channel.
struct Columns {
  cpu::Geometry geometry;
  int64_t repeat;
};
Columns columns_of(const cpu::Geometry& geometry);

// A new tensor like the dense x. Large ones are put on huge pages, where the system has them: a
// fresh tensor's page faults otherwise cost several times what writing it does.
Tensor new_like(const Tensor& x);

// Larger than what the cache keeps for the next operation: written past it.
bool too_large_for_cache(const Tensor& x);

void check_cpu(const char* name, const Tensor& t);
// A per-channel tensor read into doubles, of any dtype and stride; `missing` where there is none.
void read_channel(const OptionalTensor& t, int64_t channels, double missing, double* values);
std::vector<double> read_channel(const OptionalTensor& t, int64_t channels, double missing);
// values written to a dense or strided per-channel tensor, in its dtype.
void write_channel(const Tensor& t, int64_t channels, const double* values);
void write_channel(const Tensor& t, const std::vector<double>& values);

// The per-channel arrays of one call in one piece of memory, of `length` uninitialised values each:
// on a small activation each allocation costs as much as what is done with it.
class ChannelArrays {
 public:
  ChannelArrays(int64_t length, int arrays)
      : length_(length), memory_(new double[size_t(length * arrays)]), next_(memory_.get()) {}
  // The next array, at most `arrays` of them.
  template <class A>
  A* take() {
    static_assert(sizeof(A) <= sizeof(double));
    return reinterpret_cast<A*>(std::exchange(next_, next_ + length_));
  }

 private:
  int64_t length_;
  std::unique_ptr<double[]> memory_;
  double* next_;
};

// Each of `channels` values at the front of an array written `repeat` times, in its place.
template <class A>
void spread(A* values, int64_t channels, int64_t repeat) {
  if (repeat == 1) return;
  for (int64_t c = channels - 1; c >= 0; --c) {
    const A value = values[c];
    for (int64_t i = 0; i < repeat; ++i) values[c * repeat + i] = value;
  }
}

// weight * invstd from the *saved* statistics, so that forward and backward have the same bits.
std::vector<double> scale_of(const std::vector<double>& invstd, const OptionalTensor& weight);
// Where a backward finds the ReLU's mask.
cpu::MaskSource mask_source(bool relu, const OptionalTensor& mask);

// Per-channel coefficients in the accumulation type, rounded once from double, each `repeat` times.
class Coefficients {
 public:
  Coefficients(const std::vector<double>& values, bool in_double, int64_t repeat = 1);
  const void* data() const {
    return in_double_ ? static_cast<const void*>(doubles_.data())
                      : static_cast<const void*>(floats_.data());
  }

 private:
  bool in_double_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

// Forwards that make nothing but y, the CPU's alone.
Tensor add_relu_inference(Tensor x, Tensor residual);
Tensor batch_norm_act_inference(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                OptionalTensor residual, Tensor running_mean, Tensor running_var,
                                double eps, bool relu);
// Convolutions of packed weights (resnet_fast/_conv.py), the CPU's alone.
Tensor conv_winograd(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual,
                     std::vector<int64_t> padding, int64_t tile, bool relu);
void conv_winograd_(Tensor residual, Tensor x, Tensor weight, Tensor bias,
                    std::vector<int64_t> padding, int64_t tile, bool relu);
Tensor conv_stem(Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> kernel,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, bool relu,
                 bool max_pool);

}  // namespace resnet_fast
