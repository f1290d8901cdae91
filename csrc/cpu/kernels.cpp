// SPDX-License-Identifier: BSD-3-Clause
// The choice among the instruction sets' tables, at the first call.
#include "isa.h"
#include "params.h"

namespace resnet_fast::cpu {

namespace baseline {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

const KernelTable& table_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return avx512::kTable;
  if (set == InstructionSet::kAvx2) return avx2::kTable;
#endif
  (void)set;
  return baseline::kTable;
}

const KernelTable*& chosen() {
  static const KernelTable* table = &table_of(instruction_set());
  return table;
}

const KernelTable& kernels() { return *chosen(); }

}  // namespace resnet_fast::cpu

// For tests, by ctypes: the kernels of a narrower instruction set, so that each is tested on one
// machine. Returns 0, or -1 for one that this processor does not run.
extern "C" __attribute__((visibility("default"))) int resnet_fast_use_instruction_set(int set) {
  using namespace resnet_fast::cpu;
  if (set < 0 || set > int(instruction_set())) return -1;
  chosen() = &table_of(InstructionSet(set));
  return 0;
}
