// SPDX-License-Identifier: BSD-3-Clause
// Groups the accesses of a block's threads into warp-wide instructions and counts what they move.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"

namespace resnet_fast::emu {

// Lanes run one after another, so an instruction's accesses arrive apart from each other. They are
// brought together by (instruction, how often the lane has executed it): the instruction is known
// by the return address of the call that reports the access.
class AccessLog {
 public:
  // Forgets what it knows of the kernel before; call once per launch.
  void start_launch(int threads);
  void add(int thread, const void* site, uintptr_t address, int bytes, Access access);
  // Counts what the block did and makes ready for the next.
  void finish_block(Counters* counters);

 private:
  struct Instruction {
    Access access;
    int bytes;
    uint32_t active = 0;  // lanes
    uintptr_t address[32];
  };
  struct Site {
    std::vector<std::vector<Instruction>> warps;  // [warp][occurrence]
    std::vector<uint32_t> executed;               // by thread
  };
  static void count_global(const Instruction& instruction, Counters* counters);
  static void count_shared(const Instruction& instruction, Counters* counters);

  struct Recent {
    const void* key = nullptr;
    Site* site = nullptr;
  };
  Site& find(const void* key);

  int threads_ = 0;
  std::unordered_map<const void*, Site> sites_;  // never moves its elements
  Recent recent_[256];                           // spares most look-ups
};

}  // namespace resnet_fast::emu
