// SPDX-License-Identifier: BSD-3-Clause
// y = relu(x * scale + residual), with a 1-bit mask, and its gradients; one scale for each image
// and channel, or one for all. With g the gradient where the mask's bit is set, else 0:
//   dresidual = g     dx = g * scale     dscale(n, c) = sum of g * x over the pixels
//
// Bytes moved for numel elements of b bytes: forward 3 b numel + numel / 8; backward 4 b numel +
// numel / 8 (reads grad and x, writes dx and dresidual): each tensor once.
// The product is rounded to the dtype before the sum, so that y and dx have PyTorch's bits.
#include "reduce.h"
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {
namespace {

// ---- the walk
// ------------------------------------------------------------------------------------ A run is the
// memory that a set of scales covers: a plane with one, or a channels-last image with C that
// repeat.
inline int64_t length_of_run(const ScaleParams& s) {
  return s.channels_last ? s.channels * s.pixels : s.pixels;
}

// The scales of one image, written out to a period that packs divide, with a pack to spare at
// either end: an image need not start at a multiple of sixteen.
template <class A>
class Spread {
 public:
  explicit Spread(int64_t channels)
      : period(period_of(channels)), channels_(channels), memory_(period + 2 * kLanes) {
    std::memset(memory_.get(), 0, (period + 2 * kLanes) * sizeof(A));
  }
  // No more of it than an image of `length` elements reads.
  void fill(const A* scale, int64_t length) {
    A* const first = memory_.get() + kLanes;
    const int64_t end = minimum(period, length);
    for (int64_t p = 0; p < end; p += channels_) {
      std::memcpy(first + p, scale, channels_ * sizeof(A));
    }
    if (length > period) std::memcpy(first + period, first, kLanes * sizeof(A));
  }
  RF_INLINE Pack<A> at(int64_t p) const { return load(memory_.get() + kLanes + p); }
  const int64_t period;

 private:
  int64_t channels_;
  Scratch<A> memory_;
};

// Calls body.whole(i, c, p) and body.part(i, lo, hi, c, p) for the elements [begin, end) of an
// image that starts at `origin`; p: the place of element i in the period, -15 at least.
template <class A, class Body>
RF_INLINE void walk_image(int64_t begin, int64_t end, int64_t origin, const Spread<A>& spread,
                          Body&& body) {
  const int64_t period = spread.period;
  int64_t i = begin / kLanes * kLanes;
  int64_t p = i - origin;
  if (p >= period) p %= period;
  if (i < begin) {
    body.part(i, int(begin - i), int(minimum(end - i, kLanes)), spread.at(p), p);
    i += kLanes;
    p += kLanes;
  }
  for (; i + kLanes <= end; i += kLanes, p += kLanes) {
    if (p >= period) p -= period;
    body.whole(i, spread.at(p), p);
  }
  if (p >= period) p -= period;
  if (i < end) body.part(i, 0, int(end - i), spread.at(p), p);
}

// Every element once, in packs, cut up among the threads anywhere.
template <class A, class Body>
void walk_flat(const ScaleParams& s, const Parallel& parallel, const Body& body) {
  const A* const scale = static_cast<const A*>(s.scale);
  const int64_t length = length_of_run(s);
  const int64_t numel = s.images * s.channels * s.pixels;
  parallel_for(parallel, ceil_div(numel, kLanes), kGrain / kLanes,
               [&](int64_t first, int64_t last) {
                 const int64_t end = minimum(last * kLanes, numel);
                 Spread<A> spread(s.channels_last ? s.channels : 1);
                 int64_t run = first * kLanes / length;
                 for (int64_t i = first * kLanes; i < end; ++run) {
                   const int64_t stop = minimum((run + 1) * length, end);
                   if (s.channels_last) {
                     spread.fill(scale + run * s.channels, length);
                     walk_image(i, stop, run * length, spread, body);
                   } else {
                     const Pack<A> c = broadcast(scale[run]);
                     walk_run(i, stop, c, body);
                   }
                   i = stop;
                 }
                 finish_streaming();
               });
}

// ---- forward
// -------------------------------------------------------------------------------------
template <class T>
struct Forward {
  using A = Accumulate<T>;
  const T* x;
  const T* residual;
  T* y;
  uint16_t* mask;
  bool streamed;

  RF_INLINE void whole(int64_t i, const Pack<A>& c, int64_t = 0) const {
    const auto r = rounded<T>(rounded<T>(load(x + i) * c) + load(residual + i));
    put(y + i, relu(r), streamed);
    if (mask) mask[i / kLanes] = above(r, A(0));
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A>& c, int64_t = 0) const {
    const auto r =
        rounded<T>(rounded<T>(load_part(x + i, lo, hi) * c) + load_part(residual + i, lo, hi));
    store_part(y + i, relu(r), lo, hi);
    if (mask) store_mask_part(mask + i / kLanes, above(r, A(0)), lo, hi);
  }
};

// ---- backward
// ------------------------------------------------------------------------------------
template <class T>
struct Backward {
  using A = Accumulate<T>;
  const T* grad;
  const uint16_t* mask;
  T* dx;         // or null
  T* dresidual;  // or null
  bool streamed;

  // These return g.
  RF_INLINE Pack<A> whole(int64_t i, const Pack<A>& c, int64_t = 0) const {
    const Pack<A> g = select(mask[i / kLanes], load(grad + i));
    if (dresidual) put(dresidual + i, g, streamed);
    if (dx) put(dx + i, g * c, streamed);
    return g;
  }
  RF_INLINE Pack<A> part(int64_t i, int lo, int hi, const Pack<A>& c, int64_t = 0) const {
    const Pack<A> g = select(mask[i / kLanes], load_part(grad + i, lo, hi));
    if (dresidual) store_part(dresidual + i, g, lo, hi);
    if (dx) store_part(dx + i, g * c, lo, hi);
    return select(lane_bits(lo, hi), g);
  }
};

// The sum of one plane, in a block of so few packs that its rounding stays small.
template <class T>
struct PlaneSum {
  using A = Accumulate<T>;
  const T* x;
  const Backward<T>& backward;
  Pack<A> block = broadcast(A(0));
  int64_t packs = 0;
  double total = 0;

  RF_INLINE void whole(int64_t i, const Pack<A>& c) {
    block = fma(backward.whole(i, c), load(x + i), block);
    if (++packs == kBlock) end_block();
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A>& c) {
    const Pack<A> g = backward.part(i, lo, hi, c);
    block = fma(g, select(lane_bits(lo, hi), load_part(x + i, lo, hi)), block);
  }
  RF_INLINE void end_block() {
    total += sum(block);
    block = broadcast(A(0));
    packs = 0;
  }
};

template <class T>
void sum_planes(const ScaledAddReluGradParams& p, const Backward<T>& backward,
                const Parallel& parallel) {
  using A = Accumulate<T>;
  const ScaleParams& s = p.scale;
  parallel_for(parallel, s.images * s.channels, ceil_div(kGrain, s.pixels),
               [&](int64_t first, int64_t last) {
                 for (int64_t plane = first; plane < last; ++plane) {
                   const Pack<A> c = broadcast(static_cast<const A*>(s.scale)[plane]);
                   PlaneSum<T> sum{static_cast<const T*>(p.x), backward};
                   walk_run(plane * s.pixels, (plane + 1) * s.pixels, c, sum);
                   sum.end_block();
                   p.dscale[plane] = sum.total;
                 }
                 finish_streaming();
               });
}

// Adds g * x to one accumulator for each place in the period.
template <class T>
struct ImageSum {
  using A = Accumulate<T>;
  const T* x;
  const Backward<T>& backward;
  A* sums;  // of place 0

  RF_INLINE void whole(int64_t i, const Pack<A>& c, int64_t p) const {
    store(sums + p, fma(backward.whole(i, c), load(x + i), load(sums + p)));
  }
  RF_INLINE void part(int64_t i, int lo, int hi, const Pack<A>& c, int64_t p) const {
    const Pack<A> g = backward.part(i, lo, hi, c);
    const Pack<A> v = select(lane_bits(lo, hi), load_part(x + i, lo, hi));
    store(sums + p, fma(g, v, load(sums + p)));
  }
};

// dscale of the elements [begin, end) of an image, C doubles, with `places` = period + 2 packs of
// working memory in each of the two types.
template <class T>
void sum_of_image(const ScaledAddReluGradParams& p, const Backward<T>& backward, int64_t begin,
                  int64_t end, int64_t origin, const Spread<Accumulate<T>>& spread,
                  Accumulate<T>* block, double* totals, double* out) {
  const int64_t places = spread.period + 2 * kLanes, channels = p.scale.channels;
  const ImageSum<T> body{static_cast<const T*>(p.x), backward, block + kLanes};
  std::memset(totals, 0, places * sizeof(double));
  for (int64_t i = begin; i < end; i += kBlock * spread.period) {
    std::memset(block, 0, places * sizeof(Accumulate<T>));
    walk_image(i, minimum(i + kBlock * spread.period, end), origin, spread, body);
    for (int64_t k = 0; k < places; ++k) totals[k] += double(block[k]);
  }
  // NOTE: what lies before place 0 belongs to the image before, and only zeros were added there.
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = 0;
    for (int64_t k = c; k < spread.period + kLanes; k += channels) out[c] += totals[kLanes + k];
  }
}

template <class T>
void sum_images(const ScaledAddReluGradParams& p, const Backward<T>& backward,
                const Parallel& parallel) {
  using A = Accumulate<T>;
  const ScaleParams& s = p.scale;
  const int64_t length = length_of_run(s), period = period_of(s.channels);
  // Images are cut into chunks where there are few, by the shape alone; chunks are merged in order.
  const int64_t chunks = maximum(1, minimum(ceil_div(kTasks, s.images), length / kTaskElements));
  const int64_t size = ceil_div(ceil_div(length, period), chunks) * period;
  Scratch<double> partial(s.images * chunks * s.channels);
  parallel_for(parallel, s.images * chunks, ceil_div(kGrain, minimum(size, length)),
               [&](int64_t first, int64_t last) {
                 Spread<A> spread(s.channels);
                 Scratch<A> block(period + 2 * kLanes);
                 Scratch<double> totals(period + 2 * kLanes);
                 for (int64_t t = first; t < last; ++t) {
                   const int64_t image = t / chunks, origin = image * length;
                   const int64_t from = minimum(t % chunks * size, length);
                   spread.fill(static_cast<const A*>(s.scale) + image * s.channels, length);
                   sum_of_image<T>(p, backward, origin + from,
                                   origin + minimum(from + size, length), origin, spread,
                                   block.get(), totals.get(), partial.get() + t * s.channels);
                 }
                 finish_streaming();
               });
  for (int64_t image = 0; image < s.images; ++image) {
    double* const out = p.dscale + image * s.channels;
    const double* const parts = partial.get() + image * chunks * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) {
      out[c] = 0;
      for (int64_t k = 0; k < chunks; ++k) out[c] += parts[k * s.channels + c];
    }
  }
}

}  // namespace

void scaled_add_relu(const ScaledAddReluParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    walk_flat<Accumulate<T>>(
        p.scale, parallel,
        Forward<T>{static_cast<const T*>(p.x), static_cast<const T*>(p.residual),
                   static_cast<T*>(p.y), p.mask, p.stream});
  });
}

void scaled_add_relu_grad(const ScaledAddReluGradParams& p, const Parallel& parallel) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> backward{static_cast<const T*>(p.grad), p.mask, static_cast<T*>(p.dx),
                               static_cast<T*>(p.dresidual), p.stream};
    if (p.dscale == nullptr) {
      walk_flat<Accumulate<T>>(p.scale, parallel, backward);
    } else if (p.scale.channels_last) {
      sum_images<T>(p, backward, parallel);
    } else {
      sum_planes<T>(p, backward, parallel);
    }
  });
}

}  // namespace resnet_fast::cpu::RF_ISA
