// SPDX-License-Identifier: BSD-3-Clause
// One batch norm, forward and backward: its tensors, in exact-size buffers, and its launches.
#pragma once

#include "harness.h"

namespace resnet_fast::test {

struct Case {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool training = true, residual = false, relu = true, affine = true, misaligned = false;
  double mean = 0.3, deviation = 1;

  int64_t elements() const { return elements_of(shape); }
  int64_t per_channel() const { return shape.n * shape.inner; }
  // Memory offset of value i of channel c.
  int64_t at(int64_t c, int64_t i) const {
    if (shape.layout == Layout::kChannelsLast) return i * shape.c + c;
    return (i / shape.inner * shape.c + c) * shape.inner + i % shape.inner;
  }
  std::string name() const {
    return std::string("batch_norm ") + name_of(dtype) + " N" + std::to_string(shape.n) + " C" +
           std::to_string(shape.c) + " HW" + std::to_string(shape.inner) +
           (shape.layout == Layout::kChannelsLast ? " channels_last" : " nchw") +
           (training ? " training" : " eval") + (residual ? " residual" : "") +
           (relu ? " relu" : "") + (affine ? "" : " no affine") +
           (misaligned ? " misaligned" : "") + ": ";
  }
};

// Mean and sum of squared deviations of a channel, in a type wider than any that is tested.
struct Moments {
  long double mean = 0, m2 = 0;
};
inline Moments moments(const Case& c, const std::vector<double>& x, int64_t channel) {
  Moments result;
  for (int64_t i = 0; i < c.per_channel(); ++i) result.mean += x[c.at(channel, i)];
  result.mean /= static_cast<long double>(c.per_channel());
  for (int64_t i = 0; i < c.per_channel(); ++i) {
    const long double deviation = x[c.at(channel, i)] - result.mean;
    result.m2 += deviation * deviation;
  }
  return result;
}

// Everything one forward and backward touch, and the launches.
struct Run {
  Case c;
  Tensor x, residual, y, weight, bias, running_mean, running_var, mean, invstd;
  Tensor grad, dx, dresidual, dweight, dbias;
  Buffer mask, scratch, scratch_backward;

  explicit Run(const Case& c)
      : c(c),
        x(c.dtype, c.elements(), c.misaligned),
        residual(c.dtype, c.residual ? c.elements() : 0),
        y(c.dtype, c.elements()),
        weight(accumulator_dtype(c.dtype), c.shape.c),
        bias(accumulator_dtype(c.dtype), c.shape.c),
        running_mean(accumulator_dtype(c.dtype), c.shape.c),
        running_var(accumulator_dtype(c.dtype), c.shape.c),
        mean(accumulator_dtype(c.dtype), c.shape.c),
        invstd(accumulator_dtype(c.dtype), c.shape.c),
        grad(c.dtype, c.elements()),
        dx(c.dtype, c.elements(), c.misaligned),
        dresidual(c.dtype, c.elements()),
        dweight(accumulator_dtype(c.dtype), c.shape.c),
        dbias(accumulator_dtype(c.dtype), c.shape.c),
        mask(mask_bytes(c.elements())) {
    x.fill_normal(1, c.mean, c.deviation);
    residual.fill_normal(2);
    weight.fill_normal(3, 1, 0.3);
    bias.fill_normal(4, 0, 0.5);
    running_mean.fill_normal(5);
    running_var.fill_normal(6, 3, 0.2);
    grad.fill_normal(7);
  }
  bool saves_mask() const { return c.residual && c.relu; }

  BatchNormActParams forward_params() {
    BatchNormActParams p;
    p.dtype = c.dtype;
    p.shape = c.shape;
    p.x = x.data();
    p.residual = c.residual ? residual.data() : nullptr;
    p.y = y.data();
    p.mask = saves_mask() ? static_cast<uint8_t*>(mask.data()) : nullptr;
    p.weight = c.affine ? weight.data() : nullptr;
    p.bias = c.affine ? bias.data() : nullptr;
    p.running_mean = running_mean.data();
    p.running_var = running_var.data();
    p.mean = mean.data();
    p.invstd = invstd.data();
    p.training = c.training;
    p.relu = c.relu;
    scratch = Buffer(batch_norm_act_scratch_bytes(p));
    p.scratch = scratch.data();
    return p;
  }
  BatchNormActBackwardParams backward_params() {
    BatchNormActBackwardParams p;
    p.dtype = c.dtype;
    p.shape = c.shape;
    p.grad = grad.data();
    p.x = x.data();
    p.mean = mean.data();
    p.invstd = invstd.data();
    p.weight = c.affine ? weight.data() : nullptr;
    p.bias = c.affine ? bias.data() : nullptr;
    p.mask = saves_mask() ? static_cast<uint8_t*>(mask.data()) : nullptr;
    p.dx = dx.data();
    p.dresidual = c.residual ? dresidual.data() : nullptr;
    p.dweight = dweight.data();
    p.dbias = dbias.data();
    p.training = c.training;
    p.relu = c.relu;
    return p;
  }
  Status backward(BatchNormActBackwardParams p) {
    scratch_backward = Buffer(batch_norm_act_backward_scratch_bytes(p));
    p.scratch = scratch_backward.data();
    return launch_batch_norm_act_backward(p, nullptr);
  }
};

}  // namespace resnet_fast::test
