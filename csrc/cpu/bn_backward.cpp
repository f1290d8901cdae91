// SPDX-License-Identifier: BSD-3-Clause
// Batch norm's backward in two passes: bn_reduce, then bn_grad. With g the gradient behind the ReLU
// (masked by bits, or by recomputing the forward's output from x):
//   sum = sum g     dot = sum g * (x - mean)
//   dx  = scale * (g - sum / n - (x - mean) * invstd^2 * dot / n)      scale * g in eval mode
// Reads grad and x in each pass and writes dx; with a residual bn_reduce writes g once, as the
// residual's gradient, and bn_grad reads that instead.
#include "reduce.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// The gradient behind the ReLU.
template <class T, MaskSource kSource>
struct Masked {
  using A = Accumulate<T>;
  const T* grad;
  const uint16_t* mask;
  T* out;  // or null
  bool streamed;

  // centred = x - mean, which only kRecompute looks at.
  RF_INLINE Pack<A> masked(int64_t i, const Pack<A>& g, const Pack<A>& centred,
                           const Pack<A>& scale, const Pack<A>& bias) const {
    if constexpr (kSource == MaskSource::kBits) {
      return select(mask[i / kLanes], g);
    } else if constexpr (kSource == MaskSource::kRecompute) {
      return select(above(fma(centred, scale, bias), kRoundsToZero<T>), g);
    } else {
      return g;
    }
  }
  RF_INLINE Pack<A> whole(int64_t i, const Pack<A>& centred, const Pack<A>& scale,
                          const Pack<A>& bias) const {
    const Pack<A> g = masked(i, load(grad + i), centred, scale, bias);
    if (out) put(out + i, g, streamed);
    return g;
  }
  RF_INLINE Pack<A> part(int64_t i, int lo, int hi, const Pack<A>& centred, const Pack<A>& scale,
                         const Pack<A>& bias) const {
    const Pack<A> g = masked(i, load_part(grad + i, lo, hi), centred, scale, bias);
    if (out) store_part(out + i, g, lo, hi);
    return g;
  }
};

template <class T, MaskSource kSource>
struct Reduce {
  using A = Accumulate<T>;
  const T* x;
  Masked<T, kSource> gradient;
  RF_INLINE bool writes() const { return gradient.out != nullptr; }
  RF_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(x + i);
    __builtin_prefetch(gradient.grad + i);
  }

  RF_INLINE void whole(int64_t i, const Pack<A> (&c)[3], Pack<A>& a, Pack<A>& b) const {
    const Pack<A> centred = load(x + i) - c[0];
    const Pack<A> g = gradient.whole(i, centred, c[1], c[2]);
    a = a + g;
    b = fma(g, centred, b);
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A> (&c)[3], Pack<A>& a,
                      Pack<A>& b) const {
    const uint16_t lanes = lane_bits(lo, hi);
    const Pack<A> centred = select(lanes, load_part(x + i, lo, hi) - c[0]);
    const Pack<A> g = select(lanes, gradient.part(i, lo, hi, centred, c[1], c[2]));
    a = a + g;
    b = fma(g, centred, b);
  }
};

template <class T, MaskSource kSource, bool kTraining>
struct Grad {
  using A = Accumulate<T>;
  static constexpr int kCoefficients = kTraining ? 5 : 3;
  static constexpr bool kReadsX = kTraining || kSource == MaskSource::kRecompute;
  const T* x;
  T* dx;  // or null
  Masked<T, kSource> gradient;

  RF_INLINE Pack<A> compute(const Pack<A>& g, const Pack<A>& centred,
                            const Pack<A> (&c)[kCoefficients]) const {
    if constexpr (kTraining) {
      return c[1] * ((g - c[3]) - centred * c[4]);
    } else {
      return c[1] * g;
    }
  }
  RF_INLINE void whole(int64_t i, const Pack<A> (&c)[kCoefficients]) const {
    Pack<A> centred = c[0];
    if constexpr (kReadsX) centred = load(x + i) - c[0];
    const Pack<A> g = gradient.whole(i, centred, c[1], c[2]);
    if (dx) put(dx + i, compute(g, centred, c), gradient.streamed);
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A> (&c)[kCoefficients]) const {
    Pack<A> centred = c[0];
    if constexpr (kReadsX) centred = load_part(x + i, lo, hi) - c[0];
    const Pack<A> g = gradient.part(i, lo, hi, centred, c[1], c[2]);
    if (dx) store_part(dx + i, compute(g, centred, c), lo, hi);
  }
  RF_INLINE void finish() const { finish_streaming(); }
};

template <class A>
void add_lanes(int64_t lanes, double* __restrict total, const A* __restrict addend) {
  for (int64_t l = 0; l < lanes; ++l) total[l] += double(addend[l]);
}

template <class T, class Body>
void reduce_rows(const BnReduceParams& p, const Body& body,
                 const Accumulate<T>* const (&coefficients)[3], const Parallel& parallel) {
  using A = Accumulate<T>;
  const Geometry& g = p.geometry;
  const Repeated<A, 3> repeated(coefficients, g.channels);
  const int64_t period = repeated.period, repeats = g.numel() / period;
  const int64_t tasks = minimum(tasks_for(g.numel()), maximum(repeats, 1));
  Scratch<double> partial(2 * tasks * period);
  double* const sums = partial.get();
  double* const dots = sums + tasks * period;
  std::memset(sums, 0, 2 * tasks * period * sizeof(double));

  const auto add = [&](const auto* s1, const auto* s2, int64_t at) {
    add_lanes(period, sums + at, s1);
    add_lanes(period, dots + at, s2);
  };
  parallel_for(parallel, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> block(2 * period);
    A *s1 = block.get(), *s2 = s1 + period;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t last = repeats * (t + 1) / tasks;
      for (int64_t r = repeats * t / tasks; r < last; r += kBlock) {
        add_block(body, repeated, r * period, minimum(kBlock, last - r), s1, s2);
        add(s1, s2, t * period);
      }
    }
    finish_streaming();
  });
  Scratch<A> rest(2 * period);
  add_rest(body, repeated, repeats * period, g.numel(), rest.get(), rest.get() + period);
  add(rest.get(), rest.get() + period, 0);
  for (int64_t t = 1; t < tasks; ++t) add(sums + t * period, dots + t * period, 0);
  for (int64_t c = 0; c < g.channels; ++c) {
    double sum = 0, dot = 0;
    for (int64_t l = c; l < period; l += g.channels) {
      sum += sums[l];
      dot += dots[l];
    }
    p.sum[c] = sum;
    p.dot[c] = dot;
  }
}

template <class T, class Body>
void reduce_planes(const BnReduceParams& p, const Body& body,
                   const Accumulate<T>* const (&coefficients)[3], const Parallel& parallel) {
  using A = Accumulate<T>;
  const Geometry& g = p.geometry;
  const int64_t items = chunks_for(g) * g.channels;
  Scratch<double> partial(2 * items);
  double* const sums = partial.get();
  double* const dots = sums + items;

  for_each_plane_task(g, parallel, [&](int64_t t, int64_t channel, int64_t first, int64_t last) {
    Pack<A> c[3];
    for (int k = 0; k < 3; ++k) c[k] = broadcast(coefficients[k][channel]);
    double total = 0, dot = 0;
    accumulate_planes(g, channel, first, last, c, body, [&](double s1, double s2, int64_t) {
      total += s1;
      dot += s2;
    });
    sums[t] = total;
    dots[t] = dot;
    finish_streaming();
  });
  for (int64_t c = 0; c < g.channels; ++c) {
    p.sum[c] = p.dot[c] = 0;
    for (int64_t t = c; t < items; t += g.channels) {
      p.sum[c] += sums[t];
      p.dot[c] += dots[t];
    }
  }
}

// Calls body with a constant of the mask's source.
template <MaskSource kSource>
struct SourceConstant {
  static constexpr MaskSource value = kSource;
};

template <class Body>
RF_INLINE void for_source(MaskSource source, const Body& body) {
  switch (source) {
    case MaskSource::kNone:
      return body(SourceConstant<MaskSource::kNone>{});
    case MaskSource::kBits:
      return body(SourceConstant<MaskSource::kBits>{});
    case MaskSource::kRecompute:
      return body(SourceConstant<MaskSource::kRecompute>{});
  }
}

template <class T, MaskSource kSource, class Params>
Masked<T, kSource> masked_of(const Params& p) {
  return {static_cast<const T*>(p.grad), p.mask, static_cast<T*>(p.masked), p.stream};
}

}  // namespace

void bn_reduce(const BnReduceParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A* const coefficients[3] = {static_cast<const A*>(p.mean), static_cast<const A*>(p.scale),
                                      static_cast<const A*>(p.bias)};
    for_source(p.source, [&](auto source) {
      constexpr MaskSource kSource = decltype(source)::value;
      const Reduce<T, kSource> body{static_cast<const T*>(p.x), masked_of<T, kSource>(p)};
      if (p.geometry.inner == 1) {
        reduce_rows<T>(p, body, coefficients, parallel);
      } else {
        reduce_planes<T>(p, body, coefficients, parallel);
      }
    });
  });
}

void bn_grad(const BnGradParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const T* const x = static_cast<const T*>(p.x);
    T* const dx = static_cast<T*>(p.dx);
    const auto of = [](const void* array) { return static_cast<const A*>(array); };
    for_source(p.source, [&](auto source) {
      constexpr MaskSource kSource = decltype(source)::value;
      if (p.offset != nullptr) {
        const A* const coefficients[5] = {of(p.mean), of(p.scale), of(p.bias), of(p.offset),
                                          of(p.slope)};
        walk(p.geometry, coefficients, parallel,
             Grad<T, kSource, true>{x, dx, masked_of<T, kSource>(p)});
      } else {
        const A* const coefficients[3] = {of(p.mean), of(p.scale), of(p.bias)};
        walk(p.geometry, coefficients, parallel,
             Grad<T, kSource, false>{x, dx, masked_of<T, kSource>(p)});
      }
    });
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
