// SPDX-License-Identifier: BSD-3-Clause
// All registrations of this folder: the CUDA key, or the emulator's operators of their own.
#include "tensors.h"

#if defined(RF_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
#endif
  m.impl("add_relu_forward", TORCH_BOX(&resnet_fast::add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&resnet_fast::add_relu_backward));
  m.impl("batch_norm_act_forward", TORCH_BOX(&resnet_fast::batch_norm_act_forward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&resnet_fast::batch_norm_act_backward));
  m.impl("batch_norm_act_backward_", TORCH_BOX(&resnet_fast::batch_norm_act_backward_));
  m.impl("batch_norm_statistics", TORCH_BOX(&resnet_fast::batch_norm_statistics));
  m.impl("batch_norm_act_backward_reduce", TORCH_BOX(&resnet_fast::batch_norm_act_backward_reduce));
  m.impl("batch_norm_act_backward_apply", TORCH_BOX(&resnet_fast::batch_norm_act_backward_apply));
}

#if !defined(RF_EMULATE)
// Why the current device cannot run the kernels of this build; "" if it can. For ctypes: env.py.
extern "C" __attribute__((visibility("default"))) const char* resnet_fast_cuda_problem() {
  return resnet_fast::device_status().message;
}
#endif
