// SPDX-License-Identifier: BSD-3-Clause
#include "emulator/access_log.h"

#include <algorithm>
#include <iterator>

namespace resnet_fast::emu {

void AccessLog::start_launch(int threads) {
  threads_ = threads;
  sites_.clear();
  std::fill(std::begin(recent_), std::end(recent_), Recent{});
}

AccessLog::Site& AccessLog::find(const void* key) {
  const auto bits = reinterpret_cast<uintptr_t>(key);
  Recent& recent = recent_[(bits ^ bits >> 8) % 256];
  if (recent.key != key) {
    recent = {key, &sites_[key]};
    if (recent.site->executed.empty()) {
      recent.site->executed.resize(threads_);
      recent.site->warps.resize((threads_ + 31) / 32);
    }
  }
  return *recent.site;
}

void AccessLog::add(int thread, const void* site, uintptr_t address, int bytes, Access access) {
  Site& own = find(site);
  auto& instructions = own.warps[thread / 32];
  const uint32_t occurrence = own.executed[thread]++;
  if (occurrence >= instructions.size()) {
    instructions.emplace_back();
    instructions.back().access = access;
    instructions.back().bytes = bytes;
  }
  Instruction& instruction = instructions[occurrence];
  instruction.active |= 1u << (thread % 32);
  instruction.address[thread % 32] = address;
}

void AccessLog::finish_block(Counters* counters) {
  for (auto& [key, site] : sites_) {
    for (auto& warp : site.warps) {
      for (const Instruction& instruction : warp)
        (instruction.access == Access::kShared ? count_shared : count_global)(instruction,
                                                                              counters);
      warp.clear();  // keeps its memory
    }
    std::fill(site.executed.begin(), site.executed.end(), 0);
  }
}

void AccessLog::count_global(const Instruction& instruction, Counters* counters) {
  uintptr_t address[32];
  int lanes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (instruction.active >> lane & 1) address[lanes++] = instruction.address[lane];
  if (!std::is_sorted(address, address + lanes)) std::sort(address, address + lanes);
  int64_t bytes = 0, sectors = 0;
  uintptr_t covered = 0, last_sector = ~uintptr_t{0};
  for (int i = 0; i < lanes; ++i) {
    const uintptr_t end = address[i] + instruction.bytes;
    if (end > covered) bytes += end - std::max(covered, address[i]);
    covered = std::max(covered, end);
    for (uintptr_t sector = address[i] / 32; sector <= (end - 1) / 32; ++sector) {
      if (sector == last_sector) continue;
      last_sector = sector;
      ++sectors;
    }
  }
  switch (instruction.access) {
    case Access::kRead:
      counters->bytes_read += bytes, counters->sectors_read += sectors;
      break;
    case Access::kCachedRead:
      counters->bytes_cached += bytes, counters->sectors_cached += sectors;
      break;
    default:
      counters->bytes_written += bytes, counters->sectors_written += sectors;
  }
}

// Shared memory serves 32 banks of 4 bytes at a time: 32 lanes of up to 4 bytes, 16 lanes of 8 or
// 8 lanes of 16. Lanes that want different words of one bank take further turns.
void AccessLog::count_shared(const Instruction& instruction, Counters* counters) {
  const int words = std::max(1, instruction.bytes / 4);
  const int lanes_at_once = 32 / words;
  for (int first = 0; first < 32; first += lanes_at_once) {
    uintptr_t wanted[32][32];  // the distinct words of each bank
    int count[32] = {}, turns = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(instruction.active >> lane & 1)) continue;
      for (int i = 0; i < words; ++i) {
        const uintptr_t word = instruction.address[lane] / 4 + i;
        const auto bank = word % 32;
        uintptr_t* const end = wanted[bank] + count[bank];
        if (std::find(wanted[bank], end, word) != end) continue;
        *end = word;
        turns = std::max(turns, ++count[bank]);
      }
    }
    if (turns == 0) continue;
    counters->shared_accesses += 1;
    counters->bank_conflicts += turns - 1;
  }
}

}  // namespace resnet_fast::emu
