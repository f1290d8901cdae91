// SPDX-License-Identifier: BSD-3-Clause
// All registrations. Schemas are Python's (resnet_fast/_library.py): here they are only
// implemented.
#include "tensors.h"

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("add_relu_forward", TORCH_BOX(&resnet_fast::add_relu_forward));
  m.impl("add_relu_inference", TORCH_BOX(&resnet_fast::add_relu_inference));
  m.impl("scaled_add_relu_forward", TORCH_BOX(&resnet_fast::scaled_add_relu_forward));
  m.impl("scaled_add_relu_backward", TORCH_BOX(&resnet_fast::scaled_add_relu_backward));
  m.impl("max_pool_forward", TORCH_BOX(&resnet_fast::max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&resnet_fast::max_pool_backward));
  m.impl("batch_norm_act_inference", TORCH_BOX(&resnet_fast::batch_norm_act_inference));
  m.impl("add_relu_backward", TORCH_BOX(&resnet_fast::add_relu_backward));
  m.impl("batch_norm_act_forward", TORCH_BOX(&resnet_fast::batch_norm_act_forward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&resnet_fast::batch_norm_act_backward));
  m.impl("batch_norm_act_backward_", TORCH_BOX(&resnet_fast::batch_norm_act_backward_));
  m.impl("conv_winograd", TORCH_BOX(&resnet_fast::conv_winograd));
  m.impl("conv_winograd_", TORCH_BOX(&resnet_fast::conv_winograd_));
  m.impl("conv_winograd_pack", TORCH_BOX(&resnet_fast::conv_winograd_pack));
  m.impl("conv_winograd_weight", TORCH_BOX(&resnet_fast::conv_winograd_weight));
  m.impl("huge_pages", TORCH_BOX(&resnet_fast::huge_pages));
  m.impl("conv_direct", TORCH_BOX(&resnet_fast::conv_direct));
  m.impl("conv_direct_", TORCH_BOX(&resnet_fast::conv_direct_));
  m.impl("conv_sequence", TORCH_BOX(&resnet_fast::conv_sequence));
  m.impl("conv_stem_", TORCH_BOX(&resnet_fast::conv_stem_));
  m.impl("conv_stem", TORCH_BOX(&resnet_fast::conv_stem));
  m.impl("batch_norm_statistics", TORCH_BOX(&resnet_fast::batch_norm_statistics));
  m.impl("batch_norm_act_backward_reduce", TORCH_BOX(&resnet_fast::batch_norm_act_backward_reduce));
  m.impl("batch_norm_act_backward_apply", TORCH_BOX(&resnet_fast::batch_norm_act_backward_apply));
}
