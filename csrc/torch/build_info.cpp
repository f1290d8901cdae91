// SPDX-License-Identifier: BSD-3-Clause
// What was built and what runs, for `python -m resnet_fast env`. No torch headers here.
#include <pybind11/pybind11.h>

#include "../cpu/isa.h"

#ifndef RF_BUILD_DESCRIPTION
#define RF_BUILD_DESCRIPTION "unknown"
#endif

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts about the compiled extension.";
  m.def(
      "description", [] { return RF_BUILD_DESCRIPTION; },
      "Compiler, torch and CUDA of the build, as one line.");
  m.def(
      "instruction_set",
      [] { return resnet_fast::cpu::name_of(resnet_fast::cpu::instruction_set()); },
      "The instruction set that the CPU kernels run in on this machine.");
}
