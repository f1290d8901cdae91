// SPDX-License-Identifier: BSD-3-Clause
// The emulator must catch what a GPU would do wrong: each fault is planted here.
#include <sys/wait.h>
#include <unistd.h>

#include "emulator/emulator.h"
#include "harness.h"

namespace resnet_fast::test {
namespace {

constexpr int kBlock = 128;

Status run(const char* name, void (*kernel)(const float*, float*), int blocks, const float* in,
           float* out, uint64_t seed = 0) {
  emu::set_options({seed, true, 4});
  return launch(name, kernel, blocks, kBlock, 0, nullptr, in, out);
}

void reverse(const float* in, float* out) {
  RF_SHARED(float, tile, kBlock);
  store_shared(tile + threadIdx.x, load<Cache::kKeep>(in + threadIdx.x));
  __syncthreads();
  store<Cache::kKeep>(out + threadIdx.x, load_shared(tile + kBlock - 1 - threadIdx.x));
}
void reverse_without_barrier(const float* in, float* out) {
  RF_SHARED(float, tile, kBlock);
  store_shared(tile + threadIdx.x, load<Cache::kKeep>(in + threadIdx.x));
  store<Cache::kKeep>(out + threadIdx.x, load_shared(tile + kBlock - 1 - threadIdx.x));
}
void barrier_in_branch(const float*, float*) {
  if (threadIdx.x < 32) __syncthreads();
}
void two_barriers(const float*, float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void shuffle_in_branch(const float* in, float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
}
void shuffle_from_outside(const float* in, float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(0xaaaaaaaau, in[threadIdx.x], 1);
}
void read_beyond(const float* in, float* out) {
  store<Cache::kKeep>(out + threadIdx.x, load<Cache::kKeep>(in + threadIdx.x + 1));
}
void shared_beyond(const float*, float* out) {
  RF_SHARED(float, tile, kBlock);
  store_shared(tile + threadIdx.x + 1, 1.0f);
  __syncthreads();
  store<Cache::kKeep>(out + threadIdx.x, load_shared(tile + threadIdx.x));
}
// Four floats a thread through shared memory, from kShift vectors further on.
template <bool kWaits, int kShift>
void copies(const float* in, float* out) {
  RF_SHARED(float, tile, kBlock);
  using Four = Vec<float, 4>;
  if (threadIdx.x >= kBlock / 4) return;
  auto* own = reinterpret_cast<Four*>(tile) + threadIdx.x;
  copy_async(own, reinterpret_cast<const Four*>(in) + threadIdx.x + kShift);
  if (kWaits) wait_for_copies();
  store_vec<Cache::kKeep>(out + 4 * threadIdx.x, load_shared(own));
}
void misaligned_vector(const float* in, float* out) {
  store_vec<Cache::kKeep>(out + 4 * threadIdx.x, load_vec<Cache::kKeep, 4>(in + 1));
}
void strided(const float* in, float* out) {
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += load<Cache::kKeep>(in + threadIdx.x * 8 + i);
  store<Cache::kKeep>(out + threadIdx.x, sum);
}
void coalesced(const float* in, float* out) {
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += load<Cache::kKeep>(in + i * kBlock + threadIdx.x);
  store<Cache::kKeep>(out + threadIdx.x, sum);
}
template <int kPitch>
void transpose(const float* in, float* out) {
  RF_SHARED(float, tile, 32 * kPitch);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int row = warp; row < 32; row += kBlock / 32)
    store_shared(tile + row * kPitch + lane, load<Cache::kKeep>(in + row * 32 + lane));
  __syncthreads();
  for (int row = warp; row < 32; row += kBlock / 32)
    store<Cache::kKeep>(out + row * 32 + lane, load_shared(tile + lane * kPitch + row));
}
void collectives(const float* in, float* out) {
  const int lane = threadIdx.x % 32;
  float sum = in[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const unsigned low = __ballot_sync(~0u, lane < 5);
  const float third = __shfl_sync(~0u, in[threadIdx.x], 3);
  const float next = __shfl_down_sync(~0u, in[threadIdx.x], 1);
  const bool votes = __any_sync(~0u, lane == 7) && !__all_sync(~0u, lane == 7);
  __syncwarp();
  const bool right = low == 31 && third == in[threadIdx.x / 32 * 32 + 3] && votes &&
                     next == in[lane == 31 ? threadIdx.x : threadIdx.x + 1];
  atomicAdd(out + kBlock, 1.0f);
  out[threadIdx.x] = right ? sum : -1;
}
void dynamic_is_nan(const float*, float* out) {
  out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x];
}

// Whether the function ends the process with an error: what a sanitizer does.
bool dies(const std::function<void()>& function) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) _exit(0);
    function();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

void expect_error(const char* name, void (*kernel)(const float*, float*), const char* text) {
  std::vector<float> in(4 * kBlock, 1), out(4 * kBlock);
  const Status status = run(name, kernel, 1, in.data(), out.data());
  check(!status.ok() && std::strstr(status.message, text) && std::strstr(status.message, name),
        std::string("emulator: ") + name + " is not caught: " + status.message);
}

bool reverses(void (*kernel)(const float*, float*), uint64_t seed) {
  std::vector<float> in(kBlock), out(kBlock);
  for (int i = 0; i < kBlock; ++i) in[i] = static_cast<float>(i);
  if (!run("reverse", kernel, 1, in.data(), out.data(), seed).ok()) return false;
  for (int i = 0; i < kBlock; ++i)
    if (out[i] != kBlock - 1 - i) return false;
  return true;
}

emu::Counters count(const char* name, void (*kernel)(const float*, float*)) {
  std::vector<float> in(8 * kBlock, 1), out(8 * kBlock);
  emu::reset_counters();
  check(run(name, kernel, 1, in.data(), out.data()).ok(), std::string("emulator: ") + name);
  return emu::counters(name);
}

void test_counters() {
  const emu::Counters good = count("coalesced", coalesced), bad = count("strided", strided);
  check(good.bytes_read == 8 * kBlock * 4 && good.read_efficiency() == 1 &&
            good.bytes_written == kBlock * 4 && good.write_efficiency() == 1,
        "emulator: counters of a coalesced loop");
  check(bad.bytes_read == good.bytes_read && bad.read_efficiency() == 0.125,
        "emulator: an uncoalesced loop is not caught");
  const emu::Counters padded = count("transpose_33", transpose<33>);
  const emu::Counters conflicting = count("transpose_32", transpose<32>);
  check(padded.bank_conflicts == 0 && padded.shared_accesses == 64,
        "emulator: shared accesses without conflicts");
  check(conflicting.bank_conflicts == 32 * 31, "emulator: a bank conflict is not caught");
}

}  // namespace

void test_emulator() {
  for (uint64_t seed = 0; seed < 5; ++seed)
    check(reverses(reverse, seed), "emulator: shared memory and a barrier");
  bool caught = true;
  for (uint64_t seed = 0; seed < 5; ++seed) caught &= !reverses(reverse_without_barrier, seed);
  check(caught, "emulator: a missing barrier is not caught");
  expect_error("barrier_in_branch", barrier_in_branch, "barrier divergence");
  expect_error("two_barriers", two_barriers, "barrier divergence");
  expect_error("shuffle_in_branch", shuffle_in_branch, "barrier divergence");
  expect_error("shuffle_from_outside", shuffle_from_outside, "outside its mask");
  expect_error("misaligned_vector", misaligned_vector, "misaligned address");
  test_counters();

  std::vector<float> in(kBlock, 0.5f), out(kBlock + 1, 0);
  check(run("copies", copies<true, 0>, 1, in.data(), out.data()).ok() && out[0] == 0.5f &&
            out[kBlock - 1] == 0.5f,
        "emulator: asynchronous copies");
  check(run("copies", copies<false, 0>, 1, in.data(), out.data()).ok() && std::isnan(out[0]) &&
            std::isnan(out[kBlock - 1]),
        "emulator: a copy that is not waited for is not caught");
  out[kBlock] = 0;
  check(run("collectives", collectives, 1, in.data(), out.data(), 3).ok(), "emulator: collectives");
  bool right = out[kBlock] == kBlock;
  for (int i = 0; i < kBlock; ++i) right &= out[i] == 16;
  check(right, "emulator: shuffles, votes and atomics");
  check(launch("dynamic", dynamic_is_nan, 1, kBlock, kBlock * 4, nullptr, in.data(), out.data())
                .ok() &&
            std::isnan(out[0]) && std::isnan(out[kBlock - 1]),
        "emulator: dynamic shared memory starts as NaN");
  check(!launch("too_large", dynamic_is_nan, 1, 2048, 0, nullptr, in.data(), out.data()).ok(),
        "emulator: too many threads");
#if defined(__SANITIZE_ADDRESS__)
  check(dies([&] { run("read_beyond", read_beyond, 1, in.data(), out.data()); }),
        "emulator: a read out of bounds is not caught");
  check(dies([&] { run("copy_beyond", copies<true, 1>, 1, in.data(), out.data()); }),
        "emulator: an asynchronous copy from out of bounds is not caught");
  check(dies([&] { run("shared_beyond", shared_beyond, 1, in.data(), out.data()); }),
        "emulator: a write beyond shared memory is not caught");
#endif
  check(!dies([&] { run("reverse", reverse, 1, in.data(), out.data()); }),
        "emulator: no false alarm");
}

}  // namespace resnet_fast::test
