// SPDX-License-Identifier: BSD-3-Clause
#include "emulator/emulator.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>

#include "emulator/access_log.h"
#include "emulator/fiber.h"

__thread uint3 threadIdx;
__thread uint3 blockIdx;
__thread uint3 blockDim;
__thread uint3 gridDim;

namespace resnet_fast::emu {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;  // per block, on sm_90

std::mutex mutex;  // guards the two below
Options current_options;
std::map<std::string, Counters> all_counters;

// SplitMix64: the order of threads depends on the seed alone, on every platform.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>(next() % n); }
};

enum class Wait { kNone, kBlock, kWarp, kFinished };

struct Thread {
  Fiber fiber;
  uint3 index;
  Wait wait;
  const char* file;  // where it waits
  int line;
  Meeting meeting;
  unsigned mask;
  int source_lane;
  uint64_t value;
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  std::vector<Copy> copies;  // asynchronous, not waited for
};

// The launch in progress on this OS thread.
class Machine {
 public:
  Status run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
             const std::function<void()>& kernel);
  void note(const void* site, const void* address, int bytes, Access access);
  void* static_shared(const char* name, int line, std::size_t bytes);
  void* dynamic_shared() { return dynamic_.get(); }
  void copy_async(void* to, const void* from, int bytes) {
    threads_[running_].copies.push_back({to, from, bytes});
  }
  void wait_for_copies() {
    std::vector<Thread::Copy>& copies = threads_[running_].copies;
    for (const Thread::Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
  }
  void wait_block(const char* file, int line);
  uint64_t wait_warp(Meeting meeting, unsigned mask, uint64_t value, int source_lane,
                     const char* file, int line);

 private:
  struct SharedArray {
    std::string name;
    int line;
    std::size_t bytes;
    std::unique_ptr<char[]> memory;  // of its exact size, for AddressSanitizer
  };
  static void thread_main(void* machine);
  void run_block();
  void start_block();
  void resume(unsigned thread);
  void release_block();
  void meet(unsigned warp, unsigned mask);
  std::string describe_stall() const;
  void fail(std::string what);

  const char* name_ = "";
  const std::function<void()>* kernel_ = nullptr;
  unsigned count_ = 0;  // threads of a block
  std::unique_ptr<Thread[]> threads_{new Thread[kMaxThreads]};
  std::vector<unsigned> ready_;
  unsigned running_ = 0, at_barrier_ = 0, finished_ = 0;
  unsigned in_collective_[kMaxThreads / 32] = {};  // lanes that wait in one, by warp
  Random random_{0};
  Options options_;
  AccessLog log_;
  std::vector<SharedArray> static_;
  std::unique_ptr<char[]> dynamic_;
  std::size_t dynamic_bytes_ = 0;
  std::string error_;
};

__thread Machine* running_machine = nullptr;  // what the kernels' calls go to

bool same_place(const Thread& a, const Thread& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void Machine::fail(std::string what) {
  if (error_.empty())
    error_ = std::string("kernel ") + name_ + ", block (" + std::to_string(blockIdx.x) + ", " +
             std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "): " + what;
}

Status Machine::run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
                    const std::function<void()>& kernel) {
  name_ = name;
  kernel_ = &kernel;
  error_.clear();
  options_ = options();
  random_.state = options_.seed;
  blockIdx = {0, 0, 0};
  blockDim = {block.x, block.y, block.z};
  gridDim = {grid.x, grid.y, grid.z};
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > kMaxSharedBytes) {
    fail("invalid launch configuration");
    return {1, error_.c_str()};
  }
  count_ = static_cast<unsigned>(threads);
  log_.start_launch(static_cast<int>(count_));
  static_.clear();
  dynamic_.reset(shared_bytes ? new char[shared_bytes] : nullptr);
  dynamic_bytes_ = shared_bytes;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (std::size_t i = blocks; i > 1; --i)
    std::swap(order[i - 1], order[random_.below(static_cast<unsigned>(i))]);
  Counters counters;
  counters.launches = 1;
  for (uint32_t index : order) {
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    run_block();
    if (!error_.empty()) return {1, error_.c_str()};
    if (options_.count) log_.finish_block(&counters);
  }
  std::lock_guard<std::mutex> lock(mutex);
  Counters& sum = all_counters[name];
  sum.launches += counters.launches;
  sum.bytes_read += counters.bytes_read, sum.sectors_read += counters.sectors_read;
  sum.bytes_cached += counters.bytes_cached, sum.sectors_cached += counters.sectors_cached;
  sum.bytes_written += counters.bytes_written, sum.sectors_written += counters.sectors_written;
  sum.shared_accesses += counters.shared_accesses, sum.bank_conflicts += counters.bank_conflicts;
  return {};
}

void Machine::start_block() {
  // All ones is NaN in every floating-point type.
  for (auto& array : static_) std::memset(array.memory.get(), 0xff, array.bytes);
  if (dynamic_) std::memset(dynamic_.get(), 0xff, dynamic_bytes_);
  ready_.clear();
  at_barrier_ = finished_ = 0;
  std::fill(std::begin(in_collective_), std::end(in_collective_), 0u);
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.wait = Wait::kNone;
    thread.copies.clear();
    thread.fiber.reset(&Machine::thread_main, this);
    ready_.push_back(i);
  }
}

void Machine::run_block() {
  start_block();
  while (error_.empty() && finished_ < count_) {
    if (ready_.empty()) {
      if (at_barrier_ != count_) return fail(describe_stall());
      release_block();
      continue;
    }
    const unsigned pick = random_.below(static_cast<unsigned>(ready_.size()));
    std::swap(ready_[pick], ready_.back());
    const unsigned thread = ready_.back();
    ready_.pop_back();
    resume(thread);
  }
}

void Machine::resume(unsigned thread) {
  running_ = thread;
  threadIdx = threads_[thread].index;
  threads_[thread].wait = Wait::kNone;
  threads_[thread].fiber.resume();
}

void Machine::thread_main(void* machine) {
  auto* self = static_cast<Machine*>(machine);
  (*self->kernel_)();
  self->threads_[self->running_].wait = Wait::kFinished;
  ++self->finished_;
}

void Machine::release_block() {
  for (unsigned i = 0; i < count_; ++i) {
    if (!same_place(threads_[i], threads_[0])) return fail(describe_stall());
    ready_.push_back(i);
  }
  at_barrier_ = 0;
}

std::string Machine::describe_stall() const {
  std::map<std::string, unsigned> places;
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.wait == Wait::kFinished) {
      ++places["have exited"];
    } else {
      const char* what =
          thread.wait == Wait::kBlock ? "wait at __syncthreads " : "wait in a warp collective ";
      ++places[what + std::string(thread.file) + ":" + std::to_string(thread.line)];
    }
  }
  std::string text = "barrier divergence:";
  for (const auto& [place, threads] : places)
    text += " " + std::to_string(threads) + " threads " + place + ";";
  text.pop_back();
  return text;
}

void Machine::wait_block(const char* file, int line) {
  Thread& thread = threads_[running_];
  thread.wait = Wait::kBlock;
  thread.file = file;
  thread.line = line;
  ++at_barrier_;
  thread.fiber.suspend(false);
}

uint64_t Machine::wait_warp(Meeting meeting, unsigned mask, uint64_t value, int source_lane,
                            const char* file, int line) {
  Thread& thread = threads_[running_];
  const unsigned lane = running_ % 32, warp = running_ / 32;
  const unsigned lanes = std::min(32u, count_ - warp * 32);
  if (lanes < 32) mask &= (1u << lanes) - 1;  // CUDA, too, ignores lanes that never existed
  thread.wait = Wait::kWarp;
  in_collective_[warp] |= 1u << lane;
  thread.file = file;
  thread.line = line;
  thread.meeting = meeting;
  thread.mask = mask;
  thread.value = value;
  thread.source_lane = source_lane;
  if (!(mask >> lane & 1)) {
    fail("a lane calls a warp collective whose mask leaves it out, " + std::string(file) + ":" +
         std::to_string(line));
  } else if (!(mask >> source_lane & 1)) {
    fail("a shuffle reads from a lane outside its mask, " + std::string(file) + ":" +
         std::to_string(line));
  } else {
    meet(warp, mask);
  }
  thread.fiber.suspend(false);
  return threads_[running_].value;
}

// Completes the collective if every lane of the mask has come to it.
void Machine::meet(unsigned warp, unsigned mask) {
  Thread* lanes = &threads_[warp * 32];
  const Thread& caller = threads_[running_];
  if ((in_collective_[warp] & mask) != mask) return;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = lanes[lane];
    if (other.wait != Wait::kWarp || other.mask != mask || other.meeting != caller.meeting ||
        !same_place(other, caller))
      return;
  }
  uint64_t values[32] = {}, ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    values[lane] = lanes[lane].value;
    ballot |= uint64_t{lanes[lane].value != 0} << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    lanes[lane].value =
        caller.meeting == Meeting::kBallot ? ballot : values[lanes[lane].source_lane];
    lanes[lane].wait = Wait::kNone;  // released, though it has not run yet
    ready_.push_back(warp * 32 + lane);
  }
  in_collective_[warp] &= ~mask;
}

void* Machine::static_shared(const char* name, int line, std::size_t bytes) {
  for (auto& array : static_)
    if (array.line == line && array.name == name) return array.memory.get();
  static_.push_back({name, line, bytes, std::unique_ptr<char[]>(new char[bytes])});
  std::memset(static_.back().memory.get(), 0xff, bytes);
  return static_.back().memory.get();
}

void Machine::note(const void* site, const void* address, int bytes, Access access) {
  const auto position = reinterpret_cast<uintptr_t>(address);
  if (position % bytes != 0) {
    fail("misaligned address: an access of " + std::to_string(bytes) + " bytes");
    threads_[running_].wait = Wait::kFinished;
    threads_[running_].fiber.suspend(false);  // never resumed: the launch is over
  }
  if (options_.count) log_.add(static_cast<int>(running_), site, position, bytes, access);
}

}  // namespace

Options options() {
  std::lock_guard<std::mutex> lock(mutex);
  return current_options;
}

void set_options(const Options& options) {
  std::lock_guard<std::mutex> lock(mutex);
  current_options = options;
}

std::vector<std::pair<std::string, Counters>> counters() {
  std::lock_guard<std::mutex> lock(mutex);
  return {all_counters.begin(), all_counters.end()};
}

Counters counters(const std::string& kernel) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = all_counters.find(kernel);
  return found == all_counters.end() ? Counters{} : found->second;
}

void reset_counters() {
  std::lock_guard<std::mutex> lock(mutex);
  all_counters.clear();
}

Status run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
           const std::function<void()>& kernel) {
  // Kept for the life of the OS thread: a thousand stacks are slow to map anew.
  static thread_local const std::unique_ptr<Machine> instance{new Machine};
  running_machine = instance.get();
  return instance->run(name, grid, block, shared_bytes, kernel);
}

// NOTE: not inlined, so that the return address names the instruction of the kernel.
__attribute__((noinline)) void note_access(const void* address, int bytes, Access access) {
  running_machine->note(__builtin_return_address(0), address, bytes, access);
}
void* static_shared(const char* name, int line, std::size_t bytes) {
  return running_machine->static_shared(name, line, bytes);
}
void* dynamic_shared() { return running_machine->dynamic_shared(); }
void copy_async(void* shared, const void* global, int bytes) {
  running_machine->copy_async(shared, global, bytes);
}
void wait_for_copies() { running_machine->wait_for_copies(); }
void sync_block(const char* file, int line) { running_machine->wait_block(file, line); }
uint64_t meet_warp(Meeting kind, unsigned mask, uint64_t value, int source_lane, const char* file,
                   int line) {
  return running_machine->wait_warp(kind, mask, value, source_lane, file, line);
}
int lane_id() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) %
                          32);
}

}  // namespace resnet_fast::emu
