// SPDX-License-Identifier: BSD-3-Clause
// The CUDA execution model on the host, so that kernels are tested where there is no GPU.
//
// Each thread of a block is a fiber; blocks run one after another in random order. Threads run in
// an order drawn from the seed and stop only where CUDA threads meet: __syncthreads, __syncwarp,
// shuffles and votes. Shared memory starts as NaN in every block. An error (a barrier that not all
// threads reach, a misaligned vector access, a shuffle from a lane outside its mask) ends the
// launch with a message. Every global and shared access is counted: see Counters.
//
// One launch runs on the calling OS thread alone; launches from different OS threads are
// independent. What is not modelled: blocks that wait for each other, preemption between meeting
// points, the memory model's weak ordering.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "launch/status.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The built-in variables of CUDA C++; the scheduler sets them when it resumes a thread.
extern __thread uint3 threadIdx;
extern __thread uint3 blockIdx;
extern __thread uint3 blockDim;
extern __thread uint3 gridDim;

namespace resnet_fast::emu {

// Sums over launches of one kernel name. An access is one instruction of one warp: bytes are the
// distinct bytes its lanes ask for, sectors the aligned 32-byte pieces of memory they lie in.
// "cached" reads are the small arrays that many threads read again (per-channel parameters) and
// that come from L1 or L2; "read" is what streams from memory.
struct Counters {
  int64_t launches = 0;
  int64_t bytes_read = 0, sectors_read = 0;
  int64_t bytes_cached = 0, sectors_cached = 0;
  int64_t bytes_written = 0, sectors_written = 0;
  int64_t shared_accesses = 0;  // wavefronts that shared memory needs without conflicts
  int64_t bank_conflicts = 0;   // wavefronts beyond those
  // Share of the moved sectors' bytes that was asked for.
  double read_efficiency() const { return ratio(bytes_read, sectors_read); }
  double write_efficiency() const { return ratio(bytes_written, sectors_written); }

 private:
  static double ratio(int64_t bytes, int64_t sectors) {
    return sectors ? static_cast<double>(bytes) / (32.0 * static_cast<double>(sectors)) : 1.0;
  }
};

struct Options {
  uint64_t seed = 0;
  bool count = true;  // false: accesses are checked but not counted, which is faster
  int multiprocessors = 132;
};
Options options();
void set_options(const Options& options);

std::vector<std::pair<std::string, Counters>> counters();  // by kernel name, of all OS threads
Counters counters(const std::string& kernel);
void reset_counters();

Status run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
           const std::function<void()>& kernel);

// What follows is called by kernels, through platform.cuh.
enum class Access { kRead, kCachedRead, kWrite, kShared };
void note_access(const void* address, int bytes, Access access);
void* static_shared(const char* name, int line, std::size_t bytes);
void* dynamic_shared();
// cp.async: the bytes arrive no sooner than the calling thread waits for them.
void copy_async(void* shared, const void* global, int bytes);
void wait_for_copies();
void sync_block(const char* file, int line);

enum class Meeting { kSync, kShuffle, kBallot };
// The calling lane meets the lanes of mask; returns the source lane's value, or the ballot.
uint64_t meet_warp(Meeting kind, unsigned mask, uint64_t value, int source_lane, const char* file,
                   int line);

template <class T>
T shuffle(unsigned mask, T value, int source_lane, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(Meeting::kShuffle, mask, bits, source_lane, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
int lane_id();

}  // namespace resnet_fast::emu

// CUDA's collectives. FILE and LINE are those of the call, for error messages.
#define RF_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(RF_CALLER) { resnet_fast::emu::sync_block(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, RF_CALLER) {
  using namespace resnet_fast::emu;
  meet_warp(Meeting::kSync, mask, 0, lane_id(), file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, RF_CALLER) {
  return resnet_fast::emu::shuffle(mask, value, lane & 31, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, RF_CALLER) {
  return resnet_fast::emu::shuffle(mask, value, resnet_fast::emu::lane_id() ^ lanes, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, RF_CALLER) {
  const int lane = resnet_fast::emu::lane_id();
  return resnet_fast::emu::shuffle(mask, value, lane + lanes < 32 ? lane + lanes : lane, file,
                                   line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, RF_CALLER) {
  using namespace resnet_fast::emu;
  return static_cast<unsigned>(meet_warp(Meeting::kBallot, mask, predicate, lane_id(), file, line));
}
inline bool __any_sync(unsigned mask, bool predicate, RF_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, RF_CALLER) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
// Threads are not preempted between meeting points, so plain accesses are atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
inline void __threadfence() {}

#undef RF_CALLER
