// SPDX-License-Identifier: BSD-3-Clause
// What the convolutions of packed weights share: sizes, checks, layout.
#pragma once

#include "tensors.h"

namespace resnet_fast {

using Pair = std::vector<int64_t>;

// How a kernel goes over a picture; each of two numbers, down and across.
struct Sliding {
  Pair kernel, stride, padding, dilation{1, 1};
};

// The rest of the sizes of p, which has those of the input.
void set_sliding(cpu::ConvParams& p, const Sliding& sliding);
// With the outputs' sizes behind the stem's pooling, if there is one.
cpu::ConvParams pooled_sizes(cpu::ConvParams p, bool max_pool);
// taps: how many matrices of (C_in, C_out) the packed weights hold.
void check_packed(const Tensor& weight, const cpu::ConvParams& p, int64_t taps);

// Whether x is dense in channels-last order.
bool is_rows(const Tensor& x);
// x, or a copy that is_rows.
Tensor to_rows(const Tensor& x);

}  // namespace resnet_fast
