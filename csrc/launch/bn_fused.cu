// SPDX-License-Identifier: BSD-3-Clause
#include "launch/bn_fused.h"
#include "launch/forward.h"

namespace resnet_fast {

bool runs_fused(const BatchNormActParams& p) {
  if (!p.training || p.mask || !aligned(p.x, p.residual, p.y)) return false;
  bool fits = false;
  with_dtype(p.dtype, [&](auto tag) {
    fits = plan_fused<typename decltype(tag)::type>(p.shape).blocks > 0;
    return Status{};
  });
  return fits;
}

Status launch_bn_fused(const BatchNormActParams& p, Stream stream) {
  poison(p.y, elements_of(p.shape) * size_of(p.dtype));
  poison(p.mean, p.shape.c * accumulator_size(p.dtype));
  poison(p.invstd, p.shape.c * accumulator_size(p.dtype));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FusedPlan plan = plan_fused<T>(p.shape);
    const BnStats<T, kVector<T>> stats = stats_of<T, kVector<T>>(p);
    BnApply<T> apply = apply_of<T>(p);
    apply.shape.channels = p.shape.c;
    return launch("bn_fused", bn_fused_kernel<T>, static_cast<unsigned>(plan.blocks), kThreads,
                  plan.slab_bytes, stream, stats, apply, static_cast<int>(plan.rows));
  });
}

}  // namespace resnet_fast
