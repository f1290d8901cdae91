// SPDX-License-Identifier: BSD-3-Clause
// The whole forward of a batch norm in training mode in one launch, for small feature maps: a block
// holds all values of its channels in shared memory, takes their statistics there and applies them.
//
// Layouts: channels_last (and matrices), C a multiple of 32 bytes, tensors aligned to 16 bytes. No
//          mask: a block would write two bytes or less of each row's, a sector each.
// dtypes:  float64, float32, float16, bfloat16; arithmetic as in bn_stats and bn_apply.
// Bytes moved, E elements of b bytes, C channels, statistics of a bytes:
//          2bE (+ bE with residual) + 6aC: x is read once. A row of a block is a sector of 32
//          bytes, so all of it moves in whole sectors.
// Shape:   a block copies its slab of at most 64 KB, all of it in flight at once, past the
//          registers; two blocks share a multiprocessor. One block per slab and no cluster: 32
//          channels of 7x7 bfloat16 maps occupy two blocks, so a layer of 512 channels leaves three
//          quarters of a large card idle. The slab's limit is what keeps that right: the work of
//          one block is to stay near what the launches saved would cost. By arithmetic, not
//          measured.
#pragma once

#include "kernels/bn_apply.cuh"
#include "kernels/bn_stats.cuh"

namespace resnet_fast {

constexpr int kBnFusedBlocksPerSm = 2;
constexpr int kBnFusedVectors = 2;  // across a block: a sector
template <class T>
constexpr int kBnFusedChannels = kBnFusedVectors * kVector<T>;

// The coefficients of a block's channels.
template <class T>
struct SharedAffine {
  using A = Accumulator<T>;
  A *mean, *scale, *bias;

  RF_DEVICE void put(int k, const Affine<A>& value) const {
    store_shared(mean + k, value.mean);
    store_shared(scale + k, value.scale);
    store_shared(bias + k, value.bias);
  }
  RF_DEVICE Affine<A> get(int k) const {
    return {load_shared(mean + k), load_shared(scale + k), load_shared(bias + k)};
  }
};

// A thread's vectors of the slab: rows y, y + Y, ... of column x. It copies, reads and writes these
// alone, so the slab needs no barrier.
template <class T, int U>
struct SlabRows {
  static constexpr int V = kVector<T>, X = kBnFusedVectors, Y = kThreads / X;
  Vec<T, V>* slab;
  int rows;

  RF_DEVICE static int column() { return threadIdx.x % X; }
  RF_DEVICE static int first_row() { return threadIdx.x / X; }
  RF_DEVICE Vec<T, V>* at(int row) const { return slab + row * X + column(); }
  // Calls body(row) with U rows at a time, -1 where there is none.
  template <class Body>
  RF_DEVICE void for_tiles(const Body& body) const {
    for (int base = 0; base < rows; base += U * Y) {
      int64_t row[U];
      RF_UNROLL
      for (int u = 0; u < U; ++u) {
        row[u] = base + u * Y + first_row();
        if (row[u] >= rows) row[u] = -1;
      }
      body(row);
    }
  }
};

// Statistics of the slab: written, and left in `affine` as coefficients.
template <class T, class Rows>
RF_DEVICE void slab_statistics(const BnStats<T, kVector<T>>& stats, const BnApply<T>& apply,
                               const Rows& rows, int64_t first_channel,
                               const SharedAffine<T>& affine) {
  constexpr int V = Rows::V, X = Rows::X, U = BnStats<T, V>::kU;
  using A = Accumulator<T>;
  using Block = BlockPartials<A, V>;
  RF_SHARED(A, shared_n, kThreads);
  RF_SHARED(A, shared_p, Block::kStride * V);
  RF_SHARED(A, shared_q, Block::kStride * V);
  int64_t channel[V];
  RF_UNROLL
  for (int j = 0; j < V; ++j) channel[j] = first_channel + Rows::column() * V + j;
  typename BnStats<T, V>::Channels origins;
  stats.prepare(channel, &origins);
  A n = 0, p[V] = {}, q[V] = {};
  rows.for_tiles([&](const int64_t (&row)[U]) {
    Vec<T, V> values[U];
    int count = 0;
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      if (row[u] < 0) continue;
      values[u] = load_shared(rows.at(static_cast<int>(row[u])));
      ++count;
    }
    if (count > 0) stats.add(values, row, count, origins, n, p, q);
  });
  const Block partials{shared_n, shared_p, shared_q};
  merge_rows<MergeMoments>(partials, X, Rows::Y, n, p, q);
  if (threadIdx.x < X * V) {
    const int own = threadIdx.x, at = Block::place(own);
    const auto s = stats.finish(first_channel + own, load_shared(partials.n + own / V),
                                load_shared(partials.p + at), load_shared(partials.q + at));
    affine.put(own, apply.coefficients(first_channel + own, s.mean, s.invstd));
  }
  __syncthreads();
}

// Grid: C / kBnFusedChannels. Dynamic shared memory: the slab.
template <class T>
RF_KERNEL(kThreads, kBnFusedBlocksPerSm)
bn_fused_kernel(const BnStats<T, kVector<T>> stats, const BnApply<T> p, const int row_count) {
  constexpr int V = kVector<T>, U = BnStats<T, V>::kU;
  using A = Accumulator<T>;
  RF_SHARED(A, shared_mean, kBnFusedChannels<T>);
  RF_SHARED(A, shared_scale, kBnFusedChannels<T>);
  RF_SHARED(A, shared_bias, kBnFusedChannels<T>);
  const SharedAffine<T> affine{shared_mean, shared_scale, shared_bias};
  const SlabRows<T, U> rows{dynamic_shared<Vec<T, V>>(), row_count};
  const int64_t first_channel = int64_t{blockIdx.x} * kBnFusedChannels<T>;
  const int64_t first = first_channel + rows.column() * V;
  wait_for_previous_kernel();
  for (int row = rows.first_row(); row < row_count; row += rows.Y)
    copy_async(rows.at(row),
               reinterpret_cast<const Vec<T, V>*>(p.x + row * p.shape.channels + first));
  wait_for_copies();
  slab_statistics(stats, p, rows, first_channel, affine);

  Affine<A> own[V];
  RF_UNROLL
  for (int j = 0; j < V; ++j) own[j] = affine.get(rows.column() * V + j);
  rows.for_tiles([&](const int64_t (&row)[U]) {
    Vec<T, V> residual[U];
    RF_UNROLL
    for (int u = 0; u < U; ++u)
      if (p.residual && row[u] >= 0)
        residual[u] = load_vec<Cache::kStream, V>(p.residual + row[u] * p.shape.channels + first);
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      if (row[u] < 0) continue;
      const Vec<T, V> x = load_shared(rows.at(static_cast<int>(row[u])));
      p.write(row[u] * p.shape.channels + first, p.template compute<1>(x, residual[u], own));
    }
  });
}

}  // namespace resnet_fast
