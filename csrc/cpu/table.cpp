// SPDX-License-Identifier: BSD-3-Clause
#include "table.h"

namespace resnet_fast::cpu::RF_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {add_relu,
                            masked_grad,
                            scaled_add_relu,
                            scaled_add_relu_grad,
                            bn_stats,
                            bn_apply,
                            bn_reduce,
                            bn_grad,
                            max_pool,
                            max_pool_grad,
                            conv_winograd,
                            conv_winograd_pack,
                            conv_winograd_weight,
                            conv_direct,
                            conv_stem};

}  // namespace resnet_fast::cpu::RF_ISA
