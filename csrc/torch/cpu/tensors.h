// SPDX-License-Identifier: BSD-3-Clause
// Between tensors and the CPU kernels' parameters: outputs, coefficients, threads.
#pragma once

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

// Sums of columns, `repeat` of them a channel, added up to one for each channel.
void add_columns(std::vector<double>& sums, int64_t repeat);

// A new tensor like the dense x, on_huge_pages.
Tensor new_like(const Tensor& x);
// A new tensor (n, c, h, w), channels-last whatever the sizes are, on_huge_pages. No view, which
// transposing would make of it: autograd would let nobody change it in place.
Tensor new_rows(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type);
// The tensor, which nobody has written to yet; a large one is put on huge pages, where the system
// has them: its page faults otherwise cost several times what writing it does.
Tensor on_huge_pages(Tensor fresh);

// Larger than what the cache keeps for the next operation: written past it.
bool too_large_for_cache(const Tensor& x);

void check_cpu(const char* name, const Tensor& t);
// A per-channel tensor read into doubles, of any dtype and stride; `missing` where there is none.
std::vector<double> read_channel(const OptionalTensor& t, int64_t channels, double missing);
// values written to a dense or strided per-channel tensor, in its dtype.
void write_channel(const Tensor& t, const std::vector<double>& values);

// A new per-channel tensor of values.
Tensor channel_tensor(const Tensor& x, const std::vector<double>& values, ScalarType type);

// weight * invstd from the *saved* statistics, so that forward and backward have the same bits.
std::vector<double> scale_of(const std::vector<double>& invstd, const OptionalTensor& weight);

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

// on_huge_pages for tensors that Python made.
void huge_pages(Tensor fresh);
// Forwards that make nothing but y, the CPU's alone.
Tensor add_relu_inference(Tensor x, Tensor residual);
Tensor batch_norm_act_inference(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                OptionalTensor residual, Tensor running_mean, Tensor running_var,
                                double eps, bool relu);
// A residual join with a scale on its branch (resnet_fast/_scale.py), the CPU's alone.
std::tuple<Tensor, Tensor> scaled_add_relu_forward(Tensor x, Tensor residual, OptionalTensor scale,
                                                   double factor, bool save_mask);
std::tuple<Tensor, Tensor, Tensor> scaled_add_relu_backward(Tensor grad, OptionalTensor x,
                                                            OptionalTensor scale, double factor,
                                                            Tensor mask, bool channels_last,
                                                            std::vector<bool> output_mask);
// The max-pooling of a stem (resnet_fast/_max_pool.py), the CPU's alone.
std::tuple<Tensor, Tensor> max_pool_forward(Tensor x, bool save_place);
Tensor max_pool_backward(Tensor grad, Tensor place, int64_t height, int64_t width);
// Convolutions of packed weights (resnet_fast/_conv.py), the CPU's alone.
Tensor conv_winograd(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual,
                     std::vector<int64_t> padding, int64_t tile, bool relu);
void conv_winograd_(Tensor y, Tensor x, Tensor weight, Tensor bias, bool add,
                    std::vector<int64_t> padding, int64_t tile, bool relu);
Tensor conv_winograd_pack(Tensor weight, int64_t tile, bool transposed);
Tensor conv_winograd_weight(Tensor grad, Tensor x, std::vector<int64_t> padding, int64_t tile);
Tensor conv_direct(Tensor x, Tensor weight, Tensor bias, OptionalTensor residual,
                   std::vector<int64_t> kernel, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu);
void conv_direct_(Tensor y, Tensor x, Tensor weight, Tensor bias, bool add,
                  std::vector<int64_t> kernel, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu);
void conv_sequence(Tensor memory, Tensor x, Tensor y, std::vector<Tensor> weights,
                   std::vector<Tensor> biases, std::vector<int64_t> steps);
Tensor conv_stem(Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> kernel,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, bool relu,
                 bool max_pool);
void conv_stem_(Tensor y, Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> kernel,
                std::vector<int64_t> stride, std::vector<int64_t> padding, bool relu,
                bool max_pool);

}  // namespace resnet_fast
