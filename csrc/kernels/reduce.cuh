// SPDX-License-Identifier: BSD-3-Clause
// Reduction of every channel of a tensor to two numbers, in a fixed order and without atomics:
// channel_reduce_kernel leaves one partial result per channel and split in scratch memory,
// merge_partials_kernel merges these and writes what the op wants.
//
// What is reduced is the op's affair (bn_stats.cuh, bn_backward.cuh). How the elements are divided:
//   columns: the tensor is a matrix, vectors run along a row; a thread keeps V columns and walks
//            down the rows. channels_last: rows N*H*W, columns C. NCHW with small planes: rows N,
//            columns C*P, and the block merges the P columns of a channel at the end, so that
//            planes which no vector divides (7x7, 14x14) are still read in whole sectors.
//   planes:  NCHW; a block owns a channel, its threads walk over the vectors of its planes.
// Tiles are dealt to the splits in turn: at the end of the pass, L2 holds the tensor's end, where
// the next kernel, which walks backwards, begins.
#pragma once

#include "kernels/vec.cuh"

namespace resnet_fast {

struct ReduceShape {
  int64_t rows = 0;     // columns: of the matrix. planes: vectors of a channel, N * P / V
  int64_t columns = 0;  // columns: elements of a row
  int64_t channels = 0;
  int64_t inner = 1;  // columns: those of a channel that lie side by side. planes: P
  int64_t tiles = 0;  // of unroll * threads_y rows each
  int threads_x = 1;  // columns: vectors across a block. planes: 1
  int threads_y = 1;  // rows that a block reads at once
  int unroll = 1;     // rows per thread and tile, at most the kernel's U
  bool planes = false;
  Divider plane_vectors;  // planes: by P / V
};

// (n, mean, M2) of two sets, merged by Chan's rule.
struct MergeMoments {
  template <class A>
  RF_DEVICE static void merge(A& n, A& mean, A& m2, A n2, A mean2, A m2_2) {
    if (n2 == 0) return;
    const A total = n + n2;
    const A weight = n2 / total;
    const A delta = mean2 - mean;
    mean = n == 0 ? mean2 : multiply_add(delta, weight, mean);
    m2 = n == 0 ? m2_2 : multiply_add(delta * delta, n * weight, m2 + m2_2);
    n = total;
  }
};
struct MergeSums {
  template <class A>
  RF_DEVICE static void merge(A& n, A& p, A& q, A n2, A p2, A q2) {
    n += n2;
    p += p2;
    q += q2;
  }
};

// Offsets of the vectors that this thread reads of a tile, -1 where there is none.
template <int V, int U>
RF_DEVICE void tile_offsets(const ReduceShape& shape, int64_t tile, int64_t (&offset)[U]) {
  const int x = threadIdx.x % shape.threads_x, y = threadIdx.x / shape.threads_x;
  const int64_t column = (int64_t{blockIdx.x} * shape.threads_x + x) * V;
  const bool inside = y < shape.threads_y && (shape.planes || column < shape.columns);
  RF_UNROLL
  for (int u = 0; u < U; ++u) {
    const int64_t row = (tile * shape.unroll + u) * shape.threads_y + y;
    offset[u] = -1;
    if (!inside || u >= shape.unroll || row >= shape.rows) continue;
    if (shape.planes) {
      const int64_t n = shape.plane_vectors.divide(row);
      const int64_t vector = row - n * shape.plane_vectors.divisor;
      offset[u] = (n * shape.channels + blockIdx.x) * shape.inner + vector * V;
    } else {
      offset[u] = row * shape.columns + column;
    }
  }
}

// The partial results of a block in shared memory: component j of thread t at j * kStride + t. The
// stride keeps both this order and that of the columns (j fastest) free of bank conflicts.
template <class A, int V>
struct BlockPartials {
  static constexpr int kPad = 128 / static_cast<int>(sizeof(A)) / V % 32;
  static constexpr int kStride = kThreads + kPad;
  A *n, *p, *q;

  RF_DEVICE void put(A n_own, const A (&p_own)[V], const A (&q_own)[V]) const {
    store_shared(n + threadIdx.x, n_own);
    RF_UNROLL
    for (int j = 0; j < V; ++j) {
      store_shared(p + j * kStride + threadIdx.x, p_own[j]);
      store_shared(q + j * kStride + threadIdx.x, q_own[j]);
    }
  }
  template <class Merge>
  RF_DEVICE void merge_from(int thread, A& n_own, A (&p_own)[V], A (&q_own)[V]) const {
    const A n_other = load_shared(n + thread);
    A n_merged = n_own;
    RF_UNROLL
    for (int j = 0; j < V; ++j) {
      n_merged = n_own;
      Merge::merge(n_merged, p_own[j], q_own[j], n_other, load_shared(p + j * kStride + thread),
                   load_shared(q + j * kStride + thread));
    }
    n_own = n_merged;
  }
  RF_DEVICE static int place(int column) { return column % V * kStride + column / V; }
  template <class Merge>
  RF_DEVICE void merge_column(int column, A& n_own, A& p_own, A& q_own) const {
    Merge::merge(n_own, p_own, q_own, load_shared(n + column / V), load_shared(p + place(column)),
                 load_shared(q + place(column)));
  }
};

// Merges down the block's rows, in a tree: the results of the first threads_x threads hold for all.
template <class Merge, class A, int V>
RF_DEVICE void merge_rows(const BlockPartials<A, V>& partials, int threads_x, int threads_y, A n,
                          A (&p)[V], A (&q)[V]) {
  const int y = threadIdx.x / threads_x;
  partials.put(n, p, q);
  int half = 1;
  while (half * 2 < threads_y) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (y >= half || y + half >= threads_y) continue;
    partials.template merge_from<Merge>(threadIdx.x + half * threads_x, n, p, q);
    partials.put(n, p, q);
  }
  __syncthreads();
}

// Where partial results wait for merge_partials_kernel: p and q by [split][channel], n by [split].
template <class A>
struct Partials {
  A* memory;
  int64_t channels;
  int splits;

  RF_HOST_DEVICE static int64_t size(int64_t channels, int64_t splits) {
    return splits > 1 ? (2 * channels + 1) * splits : 0;
  }
  RF_DEVICE A* p(int split) const { return memory + split * channels; }
  RF_DEVICE A* q(int split) const { return memory + (splits + split) * channels; }
  RF_DEVICE A* n(int split) const { return memory + 2 * splits * channels + split; }
};

// A channel's result of this block: finished if the block saw all of the channel.
template <class Op, class A>
RF_DEVICE void emit(const Op& op, int64_t channel, A n, A p, A q) {
  if (gridDim.y == 1) {
    op.finish(channel, n, p, q);
    return;
  }
  const int split = blockIdx.y;
  store<Cache::kKeep>(op.partials.p(split) + channel, p);
  store<Cache::kKeep>(op.partials.q(split) + channel, q);
  if (channel == 0) store<Cache::kKeep>(op.partials.n(split), n);
}

// Merges every `width` columns that lie side by side, one warp per channel. The result takes the
// place of the channel's first column.
template <class Op, class A, int V>
RF_DEVICE void merge_columns(const BlockPartials<A, V>& partials, int width, int channels_here) {
  using Merge = typename Op::Merge;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < channels_here; i += kThreads / 32) {
    A n = 0, p = 0, q = 0;
    for (int k = lane; k < width; k += 32)
      partials.template merge_column<Merge>(i * width + k, n, p, q);
    RF_UNROLL
    for (int step = 16; step > 0; step /= 2) {
      const A n2 = __shfl_down_sync(0xffffffffu, n, step);
      const A p2 = __shfl_down_sync(0xffffffffu, p, step);
      const A q2 = __shfl_down_sync(0xffffffffu, q, step);
      Merge::merge(n, p, q, n2, p2, q2);
    }
    if (lane != 0) continue;
    store_shared(partials.p + partials.place(i * width), p);
    store_shared(partials.q + partials.place(i * width), q);
  }
  __syncthreads();
}

// Grid: (channels or groups of columns, splits). Op: Element, kV, kU, kBlocksPerSm, Merge, Channels
// (what it keeps per column), prepare, accumulate, finish, partials.
template <class Op>
RF_KERNEL(kThreads, Op::kBlocksPerSm)
channel_reduce_kernel(const Op op, const ReduceShape shape) {
  constexpr int V = Op::kV, U = Op::kU;
  using A = Accumulator<typename Op::Element>;
  using Block = BlockPartials<A, V>;
  RF_SHARED(A, shared_n, kThreads);
  RF_SHARED(A, shared_p, Block::kStride * V);
  RF_SHARED(A, shared_q, Block::kStride * V);
  wait_for_previous_kernel();

  const int64_t first_column = int64_t{blockIdx.x} * shape.threads_x * V;
  int64_t channel[V];
  RF_UNROLL
  for (int j = 0; j < V; ++j) {
    const int64_t column = first_column + threadIdx.x % shape.threads_x * V + j;
    const int64_t own = shape.planes       ? blockIdx.x
                        : shape.inner == 1 ? column
                                           : column / shape.inner;
    channel[j] = own < shape.channels ? own : shape.channels - 1;
  }
  typename Op::Channels channels;
  op.prepare(channel, &channels);

  A n = 0, p[V] = {}, q[V] = {};
  for (int64_t tile = blockIdx.y; tile < shape.tiles; tile += gridDim.y) {
    int64_t offset[U];
    tile_offsets<V>(shape, tile, offset);
    op.accumulate(offset, channels, n, p, q);
  }

  const Block partials{shared_n, shared_p, shared_q};
  merge_rows<typename Op::Merge>(partials, shape.threads_x, shape.threads_y, n, p, q);
  const int width = shape.planes ? V : static_cast<int>(shape.inner);
  const int channels_here = shape.planes ? 1 : shape.threads_x * V / width;
  if (width > 1) merge_columns<Op>(partials, width, channels_here);
  for (int k = threadIdx.x; k < channels_here; k += kThreads) {
    const int64_t own = int64_t{blockIdx.x} * channels_here + k;
    if (own >= shape.channels) break;
    const int column = k * width, at = Block::place(column);
    // Every column has seen the same number of rows.
    emit(op, own, load_shared(partials.n + column / V) * static_cast<A>(width),
         load_shared(partials.p + at), load_shared(partials.q + at));
  }
}

constexpr int kMergeChannels = 8;  // per block: one 32-byte sector of float32
constexpr int kMergeBlocksPerSm = 2;

// Merges the splits of 8 channels, 32 threads to a channel.
template <class Op>
RF_KERNEL(kThreads, kMergeBlocksPerSm)
merge_partials_kernel(const Op op) {
  constexpr int kRows = kThreads / kMergeChannels, U = 4;
  using A = Accumulator<typename Op::Element>;
  using Block = BlockPartials<A, 1>;
  RF_SHARED(A, shared_n, kThreads);
  RF_SHARED(A, shared_p, Block::kStride);
  RF_SHARED(A, shared_q, Block::kStride);
  wait_for_previous_kernel();
  const auto& partials = op.partials;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const bool inside = channel < partials.channels;
  A n = 0, p[1] = {0}, q[1] = {0};
  for (int first = threadIdx.x / kMergeChannels; first < partials.splits; first += U * kRows) {
    A ns[U], ps[U], qs[U];
    RF_UNROLL
    for (int u = 0; u < U; ++u) {
      const int split = first + u * kRows;
      ns[u] = 0;
      if (!inside || split >= partials.splits) continue;
      ns[u] = load<Cache::kCached>(partials.n(split));
      ps[u] = load<Cache::kKeep>(partials.p(split) + channel);
      qs[u] = load<Cache::kKeep>(partials.q(split) + channel);
    }
    RF_UNROLL
    for (int u = 0; u < U; ++u)
      if (ns[u] != 0) Op::Merge::merge(n, p[0], q[0], ns[u], ps[u], qs[u]);
  }
  const Block block{shared_n, shared_p, shared_q};
  merge_rows<typename Op::Merge>(block, kMergeChannels, kRows, n, p, q);
  if (!inside || threadIdx.x >= kMergeChannels) return;
  n = p[0] = q[0] = 0;
  block.template merge_column<typename Op::Merge>(threadIdx.x, n, p[0], q[0]);
  op.finish(channel, n, p[0], q[0]);
}

}  // namespace resnet_fast
