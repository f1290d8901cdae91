// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/add_relu.cuh"
#include "launch/common.h"

namespace resnet_fast {
namespace {

struct FlatGrid {
  unsigned blocks, threads;
};

// One tile of kAddReluUnroll vectors per thread and block. Where that gives too few blocks to fill
// the card, blocks get half the threads.
FlatGrid plan_flat(int64_t elements, int vector) {
  const int64_t per_thread = int64_t{vector} * kAddReluUnroll;
  int64_t threads = kThreads;
  if (ceil_div(elements, per_thread * threads) < 2 * multiprocessors()) threads = kThreads / 2;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(elements, per_thread * threads));
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
}

}  // namespace

// All kernels are built for the same cards: one stands for them.
Status device_status() { return can_run(add_relu_kernel<float, 1>); }

Status launch_add_relu(const AddReluParams& p, Stream stream) {
  if (p.elements == 0) return {};
  poison(p.y, p.elements * size_of(p.dtype));
  poison(p.mask, mask_bytes(p.elements));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return with_vector<T>(aligned(p.x, p.residual, p.y), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const FlatGrid grid = plan_flat(p.elements, V);
      return launch("add_relu", add_relu_kernel<T, V>, grid.blocks, grid.threads, 0, stream,
                    static_cast<const T*>(p.x), static_cast<const T*>(p.residual),
                    static_cast<T*>(p.y), p.mask, p.elements);
    });
  });
}

Status launch_add_relu_backward(const AddReluBackwardParams& p, Stream stream) {
  if (p.elements == 0) return {};
  poison(p.dx, p.elements * size_of(p.dtype));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return with_vector<T>(aligned(p.grad, p.dx), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const FlatGrid grid = plan_flat(p.elements, V);
      return launch("add_relu_backward", add_relu_backward_kernel<T, V>, grid.blocks, grid.threads,
                    0, stream, static_cast<const T*>(p.grad), p.mask, static_cast<T*>(p.dx),
                    p.elements);
    });
  });
}

}  // namespace resnet_fast
