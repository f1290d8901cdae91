// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/bn_apply.cuh"
#include "launch/sweep.h"

namespace resnet_fast {

Status launch_bn_apply(const BatchNormActParams& p, Stream stream) {
  const int64_t elements = elements_of(p.shape);
  if (elements == 0 && (p.training || p.shape.c == 0)) return {};
  poison(p.y, elements * size_of(p.dtype));
  poison(p.mask, mask_bytes(elements));
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const bool full = aligned(p.x, p.residual, p.y);
    const SweepPlan plan = plan_sweep(p.shape, full ? kVector<T> : 1, kBnApplyBlocksPerSm);
    BnApply<T> op;
    op.shape = plan.shape;
    op.x = static_cast<const T*>(p.x);
    op.residual = static_cast<const T*>(p.residual);
    op.y = static_cast<T*>(p.y);
    op.mask = p.mask;
    op.mean = static_cast<const A*>(p.training ? p.mean : p.running_mean);
    op.invstd = static_cast<const A*>(p.invstd);
    op.var = static_cast<const A*>(p.training ? nullptr : p.running_var);
    op.weight = static_cast<const A*>(p.weight);
    op.bias = static_cast<const A*>(p.bias);
    op.mean_out = static_cast<A*>(p.mean);
    op.invstd_out = static_cast<A*>(p.invstd);
    op.eps = static_cast<A>(p.eps);
    op.relu = p.relu;
    return with_sweep<T>(plan, [&](auto width, auto channels_last) {
      return launch("bn_apply",
                    bn_apply_kernel<T, decltype(width)::value, decltype(channels_last)::value>,
                    static_cast<unsigned>(plan.blocks), kThreads, 0, stream, op);
    });
  });
}

Status launch_batch_norm_act(const BatchNormActParams& p, Stream stream) {
  if (p.training) {
    const Status status = launch_bn_stats(p, stream);
    if (!status.ok()) return status;
  }
  return launch_bn_apply(p, stream);
}

}  // namespace resnet_fast
