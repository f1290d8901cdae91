// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/bn_apply.cuh"
#include "launch/bn_fused.h"
#include "launch/forward.h"
#include "launch/sweep.h"

namespace resnet_fast {

Status launch_bn_apply(const BatchNormActParams& p, Stream stream) {
  const int64_t elements = elements_of(p.shape);
  if (elements == 0 && (p.training || p.shape.c == 0)) return {};
  poison(p.y, elements * size_of(p.dtype));
  poison(p.mask, mask_bytes(elements));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool full = aligned(p.x, p.residual, p.y);
    const SweepPlan plan = plan_sweep(p.shape, full ? kVector<T> : 1, kBnApplyBlocksPerSm);
    BnApply<T> op = apply_of<T>(p);
    op.shape = plan.shape;
    return with_sweep<T>(plan, [&](auto width, auto channels_last) {
      return launch("bn_apply",
                    bn_apply_kernel<T, decltype(width)::value, decltype(channels_last)::value>,
                    static_cast<unsigned>(plan.blocks), kThreads, 0, stream, op);
    });
  });
}

Status launch_batch_norm_act(const BatchNormActParams& p, Stream stream) {
  if (runs_fused(p)) return launch_bn_fused(p, stream);
  if (p.training) {
    const Status status = launch_bn_stats(p, stream);
    if (!status.ok()) return status;
  }
  return launch_bn_apply(p, stream);
}

}  // namespace resnet_fast
