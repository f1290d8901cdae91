// SPDX-License-Identifier: BSD-3-Clause
// add_relu: y = relu(x + residual), with a 1-bit mask for the backward, which is grad where the
// bit is set and 0 elsewhere.
//
// Layouts: any dense one, shared by all tensors; the kernels see flat memory.
// dtypes:  float64, float32, float16, bfloat16 (the last two added in float32, rounded once).
// Bytes moved, E elements of b bytes: forward 3bE, with mask 3bE + E/8; backward 2bE + E/8.
// Shape:   each thread has 4 independent 16-byte loads per operand in flight before the first use,
//          96 KB per multiprocessor, which is what HBM3e's latency asks for. No loop over
//          the grid: blocks that end make room for new ones, so the last wave stays short.
//          A misaligned tensor is read element by element (V = 1), still coalesced.
#pragma once

#include "kernels/vec.cuh"

namespace resnet_fast {

constexpr int kAddReluBlocksPerSm = 3;
constexpr int kAddReluUnroll = 4;  // vectors per thread and operand

template <class T, int V>
RF_KERNEL(kThreads, kAddReluBlocksPerSm)
add_relu_kernel(const T* x, const T* residual, T* y, uint8_t* mask, int64_t elements) {
  wait_for_previous_kernel();
  constexpr int U = kAddReluUnroll;
  using Acc = Accumulator<T>;
  const int64_t whole = whole_groups(elements);
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x * U + threadIdx.x) * V;
  const int64_t step = int64_t{blockDim.x} * V;
  Vec<T, V> a[U], b[U];
  RF_UNROLL
  for (int u = 0; u < U; ++u) {
    if (first + u * step >= whole) continue;
    a[u] = load_vec<Cache::kStream, V>(x + first + u * step);
    b[u] = load_vec<Cache::kStream, V>(residual + first + u * step);
  }
  RF_UNROLL
  for (int u = 0; u < U; ++u) {
    const int64_t at = first + u * step;
    unsigned bits = 0;
    if (at < whole) {
      Acc sum[V];
      RF_UNROLL
      for (int j = 0; j < V; ++j) sum[j] = element(a[u], j) + element(b[u], j);
      Vec<T, V> out;
      round_to(&out, sum);
      bits = positive_bits(out);
      relu(&out);
      store_vec<Cache::kKeep>(y + at, out);
    }
    if (mask) store_mask<V>(mask, at, bits, at < whole);
  }
  handle_tail(elements, mask, [&](int64_t i) {
    const Acc sum[1] = {to_accumulator(load<Cache::kStream>(x + i)) +
                        to_accumulator(load<Cache::kStream>(residual + i))};
    Vec<T, 1> out;
    round_to(&out, sum);
    const unsigned bit = positive_bits(out);
    relu(&out);
    store_vec<Cache::kKeep>(y + i, out);
    return bit != 0;
  });
}

template <class T, int V>
RF_KERNEL(kThreads, kAddReluBlocksPerSm)
add_relu_backward_kernel(const T* grad, const uint8_t* mask, T* dx, int64_t elements) {
  wait_for_previous_kernel();
  constexpr int U = kAddReluUnroll;
  const int64_t whole = whole_groups(elements);
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x * U + threadIdx.x) * V;
  const int64_t step = int64_t{blockDim.x} * V;
  Vec<T, V> g[U];
  unsigned bits[U];
  RF_UNROLL
  for (int u = 0; u < U; ++u) {
    if (first + u * step >= whole) continue;
    g[u] = load_vec<Cache::kStream, V>(grad + first + u * step);
    bits[u] = load_mask<V>(mask, first + u * step);
  }
  RF_UNROLL
  for (int u = 0; u < U; ++u) {
    if (first + u * step >= whole) continue;
    keep_where(&g[u], bits[u]);
    store_vec<Cache::kKeep>(dx + first + u * step, g[u]);
  }
  handle_tail(elements, nullptr, [&](int64_t i) {
    const bool pass = load_mask<1>(mask, i);
    store<Cache::kKeep>(dx + i, pass ? load<Cache::kStream>(grad + i) : T{});
    return pass;
  });
}

}  // namespace resnet_fast
