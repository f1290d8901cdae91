// SPDX-License-Identifier: BSD-3-Clause
// Element-wise passes over a tensor whose arithmetic depends on the channel.
//
// The tensor is flat memory in both layouts, so vectors and bytes of the mask never straddle
// anything, whatever C and H*W are. A fixed number of threads sweeps over it:
//   channels_last: the grid's width is a multiple of C, so a thread meets the same V channels in
//                  every sweep and keeps their coefficients in registers.
//   NCHW:          the channel follows from the position by two multiplications; a vector that
//                  crosses a plane's end takes a slow path.
// Sweeps run from the tensor's end to its start: what the reduction before read last is in L2.
#pragma once

#include "kernels/vec.cuh"

namespace resnet_fast {

struct SweepShape {
  int64_t elements = 0;
  int64_t channels = 0;
  int64_t inner = 1;
  Divider by_inner, by_channels;

  RF_DEVICE int64_t threads() const { return int64_t{gridDim.x} * kThreads; }
  RF_DEVICE int64_t thread() const { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
  // The channel of an element, and where in its plane the element lies.
  RF_DEVICE int64_t locate(int64_t at, int64_t* position) const {
    const int64_t plane = by_inner.divide(at);
    *position = at - plane * inner;
    return plane - by_channels.divide(plane) * channels;
  }
  RF_DEVICE int64_t channel(int64_t at, bool channels_last) const {
    int64_t position;
    return channels_last ? at - by_channels.divide(at) * channels : locate(at, &position);
  }
};

// The coefficients of V elements: of V channels, or of one.
template <class Coefficients, int V, bool kChannelsLast>
struct CoefficientCache {
  Coefficients own[V];

  // channels_last: once per thread.
  template <class Load>
  RF_DEVICE void fill(const SweepShape& shape, const Load& load_channel) {
    if constexpr (kChannelsLast) {
      RF_UNROLL
      for (int j = 0; j < V; ++j)
        own[j] = load_channel(shape.channel(shape.thread() * V + j, true));
    }
  }
  // Calls function(coefficients, stride): element j has coefficients[j * stride].
  template <class Load, class Function>
  RF_DEVICE void with(const SweepShape& shape, int64_t at, const Load& load_channel,
                      const Function& function) {
    if constexpr (kChannelsLast) {
      function(own, std::integral_constant<int, 1>{});
    } else {
      int64_t position;
      int64_t channel = shape.locate(at, &position);
      if (position + V <= shape.inner) {
        const Coefficients one = load_channel(channel);
        function(&one, std::integral_constant<int, 0>{});
        return;
      }
      RF_UNROLL
      for (int j = 0; j < V; ++j) {
        own[j] = load_channel(channel);
        if (++position < shape.inner) continue;
        position = 0;
        if (++channel == shape.channels) channel = 0;
      }
      function(own, std::integral_constant<int, 1>{});
    }
  }
};

// Calls body(at) with U positions at a time: at[u] is the first element of a vector, or at least
// whole_groups(elements) where there is none. Every thread of a warp makes the same calls.
template <int V, int U, class Body>
RF_DEVICE void sweep(const SweepShape& shape, const Body& body) {
  const int64_t vectors = whole_groups(shape.elements) / V;
  const int64_t threads = shape.threads();
  for (int64_t k = (vectors + threads - 1) / threads; k > 0; k -= U) {
    int64_t at[U];
    RF_UNROLL
    for (int u = 0; u < U; ++u)
      at[u] = (k - 1 - u >= 0 ? (k - 1 - u) * threads + shape.thread() : vectors) * V;
    body(at);
  }
}

// (x - mean) * scale + bias. NOTE: forward and backward share it: the mask is recomputed from x.
template <class A>
struct Affine {
  A mean, scale, bias;
};
template <int S, class T, int V, class Coefficients>
RF_DEVICE void normalize(const Vec<T, V>& x, const Coefficients* c, Accumulator<T> (&out)[V]) {
  RF_UNROLL
  for (int j = 0; j < V; ++j)
    out[j] = multiply_add(element(x, j) - c[S * j].mean, c[S * j].scale, c[S * j].bias);
}

}  // namespace resnet_fast
