// SPDX-License-Identifier: BSD-3-Clause
// One source for CUDA and for the emulator: launch(), shared memory, and the loads and stores that
// every kernel goes through, with cache hints on a GPU and with counters in the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "launch/status.h"

#if defined(RF_EMULATE)
#include <cmath>
#include <tuple>

#include "emulator/emulator.h"
#define RF_DEVICE inline __attribute__((always_inline))
#define RF_HOST_DEVICE inline
#define RF_KERNEL(threads, blocks_per_sm) void
#define RF_SHARED(type, name, count)     \
  type* const name = static_cast<type*>( \
      ::resnet_fast::emu::static_shared(#name, __LINE__, sizeof(type) * (count)))
#define RF_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#define RF_DEVICE __device__ __forceinline__
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#define RF_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define RF_SHARED(type, name, count) __shared__ type name[count]
#define RF_UNROLL _Pragma("unroll")
#endif

namespace resnet_fast {

constexpr int kThreads = 256;  // of every block

// The most dynamic shared memory of a launch: with 32 KB of static arrays it fits into the 99 KB
// that a block may have on every card since sm_80.
constexpr std::size_t kMaxDynamicShared = 64 * 1024;

// What a load or store expects of the caches. kKeep: the next kernel reads the data again, leave it
// in L2 if it fits. kStream: read or written once, evict it first. kCached: small and read by many
// threads (parameters); comes from L1 or L2.
enum class Cache { kKeep, kStream, kCached };

#if defined(RF_EMULATE)

// NOTE: the pointed-to type, not only the size, is read, so that UBSan sees what a GPU would.
template <Cache cache, class W>
RF_DEVICE W load(const W* address) {
  emu::note_access(address, sizeof(W),
                   cache == Cache::kCached ? emu::Access::kCachedRead : emu::Access::kRead);
  return *address;
}
template <Cache cache, class W>
RF_DEVICE void store(W* address, const W& value) {
  emu::note_access(address, sizeof(W), emu::Access::kWrite);
  *address = value;
}
template <class W>
RF_DEVICE W load_shared(const W* address) {
  emu::note_access(address, sizeof(W), emu::Access::kShared);
  return *address;
}
template <class W>
RF_DEVICE void store_shared(W* address, const W& value) {
  emu::note_access(address, sizeof(W), emu::Access::kShared);
  *address = value;
}
template <class W>
RF_DEVICE W* dynamic_shared() {
  return static_cast<W*>(emu::dynamic_shared());
}
template <class W>
RF_DEVICE void copy_async(W* shared, const W* global) {
  static_assert(sizeof(W) == 16);
  emu::note_access(global, sizeof(W), emu::Access::kRead);
  emu::note_access(shared, sizeof(W), emu::Access::kShared);
  emu::copy_async(shared, global, sizeof(W));
}
RF_DEVICE void wait_for_copies() { emu::wait_for_copies(); }
RF_DEVICE void wait_for_previous_kernel() {}

template <class... P, class... A>
Status launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block,
              std::size_t shared_bytes, Stream, const A&... arguments) {
  const std::tuple<P...> parameters(arguments...);
  return emu::run(name, grid, block, shared_bytes, [&] { std::apply(kernel, parameters); });
}
inline int multiprocessors() { return emu::options().multiprocessors; }
template <class... P>
Status can_run(void (*)(P...)) {
  return {};
}
// Outputs and scratch start as NaN, so that an element nobody writes shows.
inline void poison(void* memory, std::size_t bytes) {
  if (memory) std::memset(memory, 0xff, bytes);
}

#else

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <Cache cache, class W>
RF_DEVICE W load(const W* address) {
  using Bits = typename Word<sizeof(W)>::type;
  const auto* from = reinterpret_cast<const Bits*>(address);
  // NOTE: __ldg only for what no thread of the kernel writes; running statistics are not that.
  const Bits bits = cache == Cache::kStream   ? __ldcs(from)
                    : cache == Cache::kCached ? __ldg(from)
                                              : *from;
  W value;
  memcpy(&value, &bits, sizeof(W));
  return value;
}
template <Cache cache, class W>
RF_DEVICE void store(W* address, const W& value) {
  using Bits = typename Word<sizeof(W)>::type;
  Bits bits;
  memcpy(&bits, &value, sizeof(W));
  if (cache == Cache::kStream) {
    __stcs(reinterpret_cast<Bits*>(address), bits);
  } else {
    *reinterpret_cast<Bits*>(address) = bits;
  }
}
template <class W>
RF_DEVICE W load_shared(const W* address) {
  return *address;
}
template <class W>
RF_DEVICE void store_shared(W* address, const W& value) {
  *address = value;
}
template <class W>
RF_DEVICE W* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char resnet_fast_dynamic_shared[];
  return reinterpret_cast<W*>(resnet_fast_dynamic_shared);
}

// 16 bytes from global to shared memory, past the registers: any number may be in flight. After
// wait_for_copies() a thread sees its own; others', after a barrier behind that.
template <class W>
RF_DEVICE void copy_async(W* shared, const W* global) {
  static_assert(sizeof(W) == 16);
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
RF_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Every kernel calls this before it touches memory. launch() lets a kernel be scheduled while the
// one before it drains (programmatic dependent launch); this waits for that one's results.
RF_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Properties of the current device, asked once per device.
struct Device {
  int multiprocessors;
  int major;
};
inline Device current_device() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // multiprocessors * 256 + major; 0: not asked yet
  int index = 0, packed = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return {1, 0};
  if (index < kDevices) packed = known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0, count = 1;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    packed = count * 256 + major;
    if (index < kDevices) known[index].store(packed, std::memory_order_relaxed);
  }
  return {packed / 256, packed % 256};
}
inline int multiprocessors() { return current_device().multiprocessors; }

template <class... P, class... A>
Status launch(const char*, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
              Stream stream, const A&... arguments) {
  if (shared_bytes > 48 * 1024) {
    // NOTE: always the same number: another thread may be about to launch the same kernel.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxDynamicShared);
    if (error != cudaSuccess) {
      cudaGetLastError();  // not sticky; see can_run
      return {static_cast<int>(error), cudaGetErrorString(error)};
    }
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = current_device().major >= 9 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  return {static_cast<int>(error), error == cudaSuccess ? "" : cudaGetErrorString(error)};
}
inline void poison(void*, std::size_t) {}
// Whether the current device has code for the kernel.
template <class... P>
Status can_run(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  // Not sticky, but the next call that asks for the last error must not find this one.
  if (error != cudaSuccess) cudaGetLastError();
  return {static_cast<int>(error), error == cudaSuccess ? "" : cudaGetErrorString(error)};
}

#endif

}  // namespace resnet_fast
