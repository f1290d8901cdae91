// SPDX-License-Identifier: BSD-3-Clause
// What the backward and its phases share: their tensors as the kernels read them, and both passes.
#pragma once

#include "tensors.h"

namespace resnet_fast {

// Sums over the values of each channel: of g, the gradient behind the ReLU, and of g * (x - mean).
struct GradSums {
  std::vector<double> sum, dot;
};

// x and grad dense in one layout, and the coefficients. Of checked tensors.
class GradInput {
 public:
  // by_columns: small planes as columns_of() says, else as they are.
  GradInput(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd,
            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
            bool relu, bool by_columns);

  // The first pass. masked: null, or where g goes.
  GradSums reduce(void* masked) const;
  // The second. sums: of `count` values a channel, null in evaluation. g: null, or where the first
  // pass left it. masked, dx: null or where g, if it is not there yet, and dx go.
  void apply(const GradSums* sums, double count, const void* g, void* masked, void* dx) const;

  const Tensor& x() const { return x_; }
  const Tensor& grad() const { return grad_; }
  const std::vector<double>& invstd() const { return invstd_; }
  int64_t count() const { return geometry_.count(); }  // values of a channel

 private:
  cpu::DType dtype_;
  bool in_double_, channels_last_;
  Tensor grad_, x_;
  cpu::Geometry geometry_;
  Columns columns_;
  std::vector<double> invstd_;
  Coefficients mean_, scale_, bias_;
  cpu::MaskSource source_;
  const uint16_t* bits_;
  bool stream_;
};

}  // namespace resnet_fast
