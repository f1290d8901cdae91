// SPDX-License-Identifier: BSD-3-Clause
// Convolutions one after the other, each reading what another wrote, as one operator: a call of a
// small one costs more than many of them take.
#include <initializer_list>

#include "conv.h"

namespace resnet_fast {
namespace {

// Which kernel: 2 and 4 are Winograd's tiles. As in resnet_fast/_conv_sequence.py.
constexpr int64_t kDirect = 0, kStem = 1, kPooledStem = 3;
// Where a value lies that is not in `memory`.
constexpr int64_t kX = -1, kY = -2;

// The numbers of a step, in this order.
struct Step {
  int64_t kind, from, to, n, in_c, in_h, in_w;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t add, relu;
};
constexpr int64_t kNumbers = sizeof(Step) / sizeof(int64_t);

class Sequence {
 public:
  Sequence(const Tensor& memory, const Tensor& x, const Tensor& y) : memory_(memory), x_(x), y_(y) {
    for (const Tensor* t : {&memory, &x, &y}) {
      check_cpu("memory, x and y", *t);
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "memory, x and y must be float32");
    }
    STD_TORCH_CHECK(memory.is_contiguous(), "memory must be dense; got ", shape_text(memory));
    STD_TORCH_CHECK(x.dim() == 4 && is_rows(x), "x must be channels-last; got ", shape_text(x));
    STD_TORCH_CHECK(y.dim() == 4 && is_rows(y), "y must be channels-last; got ", shape_text(y));
  }

  cpu::ConvParams params(const Step& s, const Tensor& weight, const Tensor& bias) const {
    check_device("weight", weight, x_);
    check_device("bias", bias, x_);
    STD_TORCH_CHECK(
        weight.scalar_type() == ScalarType::Float && bias.scalar_type() == ScalarType::Float &&
            bias.is_contiguous() && bias.numel() > 0 && bias.numel() % 16 == 0,
        "weights and biases must be float32, of a multiple of 16 channels; got ", shape_text(bias));
    STD_TORCH_CHECK(s.n >= 0 && s.in_c > 0 && s.in_h > 0 && s.in_w > 0, "sizes must be positive");
    floats({s.n, s.in_c, s.in_h, s.in_w});
    cpu::ConvParams p{};
    p.n = s.n, p.in_c = s.in_c, p.in_h = s.in_h, p.in_w = s.in_w;
    set_sliding(p, {pair(s.kernel), pair(s.stride), pair(s.padding), pair(s.dilation)});
    p.out_c = bias.numel(), p.relu = s.relu != 0;
    check_kind(s, p);
    const bool tiles = s.kind == 2 || s.kind == 4;
    check_packed(weight, p, tiles ? (s.kind + 2) * (s.kind + 2) : p.kernel_h * p.kernel_w);
    const cpu::ConvParams out = pooled_sizes(p, s.kind == kPooledStem);
    p.x = place(s.from, floats({p.n, p.in_c, p.in_h, p.in_w}));
    p.y = place(s.to, floats({p.n, p.out_c, out.out_h, out.out_w}));
    p.residual = s.add ? p.y : nullptr;
    p.weight = static_cast<const float*>(weight.const_data_ptr());
    p.bias = static_cast<const float*>(bias.const_data_ptr());
    return p;
  }

 private:
  static Pair pair(const int64_t (&numbers)[2]) { return {numbers[0], numbers[1]}; }

  static int64_t floats(std::initializer_list<int64_t> sizes) {
    int64_t all = 1;
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(!__builtin_mul_overflow(all, size, &all), "sizes are too large");
    }
    return all;
  }

  static void check_kind(const Step& s, const cpu::ConvParams& p) {
    const bool stem = s.kind == kStem || s.kind == kPooledStem;
    const bool tiles = s.kind == 2 || s.kind == 4;
    STD_TORCH_CHECK(stem || tiles || s.kind == kDirect, "no such kind of step: ", s.kind);
    STD_TORCH_CHECK(!stem || (!s.add && p.dilation_h == 1 && p.dilation_w == 1),
                    "a stem adds nothing and has no dilation");
    STD_TORCH_CHECK(
        !tiles || (p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
                   p.dilation_h == 1 && p.dilation_w == 1 && p.in_c % 16 == 0),
        "Winograd's tiles need 3x3, stride 1 and a multiple of 16 channels");
  }

  float* place(int64_t at, int64_t numel) const {
    const Tensor& in = at == kX ? x_ : at == kY ? y_ : memory_;
    const int64_t first = at < 0 ? 0 : at;
    const bool fits = at >= kY && first <= in.numel() && numel <= in.numel() - first;
    STD_TORCH_CHECK(fits, "a value of ", numel, " floats does not fit at ", at);
    return static_cast<float*>(const_cast<void*>(in.const_data_ptr())) + first;
  }

  const Tensor &memory_, &x_, &y_;
};

void run(const Step& s, const cpu::ConvParams& p) {
  if (p.n == 0) return;
  const cpu::KernelTable& kernels = cpu::kernels();
  if (s.kind == kDirect) {
    kernels.conv_direct(p, torch_threads());
  } else if (s.kind == kStem || s.kind == kPooledStem) {
    kernels.conv_stem(p, s.kind == kPooledStem, torch_threads());
  } else {
    kernels.conv_winograd(p, int(s.kind), torch_threads());
  }
}

}  // namespace

void conv_sequence(Tensor memory, Tensor x, Tensor y, std::vector<Tensor> weights,
                   std::vector<Tensor> biases, std::vector<int64_t> steps) {
  const Sequence sequence(memory, x, y);
  const size_t count = weights.size();
  STD_TORCH_CHECK(biases.size() == count && steps.size() == count * kNumbers, count,
                  " weights must have as many biases and ", kNumbers, " numbers each; got ",
                  biases.size(), " and ", steps.size());
  const Step* const step = reinterpret_cast<const Step*>(steps.data());
  std::vector<cpu::ConvParams> params(count);
  for (size_t i = 0; i < count; ++i) params[i] = sequence.params(step[i], weights[i], biases[i]);
  for (size_t i = 0; i < count; ++i) {
    if (i + 1 < count)
      params[i].next = params[i + 1].weight, params[i].next_floats = weights[i + 1].numel();
    run(step[i], params[i]);
  }
}

}  // namespace resnet_fast
