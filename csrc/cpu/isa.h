// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace resnet_fast::cpu {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The widest that this processor runs and the binary holds.
InstructionSet instruction_set();
const char* name_of(InstructionSet set);

}  // namespace resnet_fast::cpu
