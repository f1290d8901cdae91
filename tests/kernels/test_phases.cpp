// SPDX-License-Identifier: BSD-3-Clause
// The phases of a batch norm, and dx written over the gradient: the backwards bit for bit what the
// whole gives, which test_batch_norm.cpp holds to plain double-precision loops.
#include "batch_norm_case.h"
#include "emulator/emulator.h"

namespace resnet_fast::test {
namespace {

void test_over_grad(const Case& c) {
  Run run(c);
  check(launch_batch_norm_act(run.forward_params(), nullptr).ok(), c.name() + "forward");
  check(run.backward(run.backward_params()).ok(), c.name() + "backward");
  const std::string grad = run.grad.bytes(), dx = run.dx.bytes();
  const std::string rest = run.dresidual.bytes() + run.dweight.bytes() + run.dbias.bytes();
  for (bool sums : {true, false}) {
    std::memcpy(run.grad.data(), grad.data(), grad.size());
    BatchNormActBackwardParams p = run.backward_params();
    p.dx = run.grad.data();
    if (!sums) p.dweight = p.dbias = nullptr;
    const Status status = run.backward(p);
    check(status.ok() && run.grad.bytes() == dx &&
              run.dresidual.bytes() + run.dweight.bytes() + run.dbias.bytes() == rest,
          c.name() + "over the gradient" + (sums ? "" : ", no sums"));
  }
}

void test_statistics(Run& run) {
  const Case& c = run.c;
  Tensor mean(DType::kFloat64, c.shape.c), m2(DType::kFloat64, c.shape.c);
  BatchNormStatisticsParams p;
  p.dtype = c.dtype;
  p.shape = c.shape;
  p.x = run.x.data();
  p.mean = static_cast<double*>(mean.data());
  p.m2 = static_cast<double*>(m2.data());
  Buffer scratch(batch_norm_statistics_scratch_bytes(p));
  p.scratch = scratch.data();
  const Status status = launch_batch_norm_statistics(p, nullptr);
  check(status.ok(), c.name() + "statistics: " + status.message);
  bool right = true;
  const double acc = accumulator_epsilon(c.dtype);
  const std::vector<double> x = run.x.values();
  for (int64_t ch = 0; ch < c.shape.c; ++ch) {
    const Moments exact = moments(c, x, ch);
    const auto want = static_cast<double>(exact.mean), want_m2 = static_cast<double>(exact.m2);
    const double deviation = std::sqrt(want_m2 / static_cast<double>(c.per_channel()));
    right &= std::abs(mean.get(ch) - want) <= acc * (2 * std::abs(want) + 4 * deviation);
    right &= std::abs(m2.get(ch) - want_m2) <= 40 * acc * want_m2;
  }
  check(right, c.name() + "statistics");
}

void test_backward(Run& run) {
  const Case& c = run.c;
  Tensor masked(c.dtype, c.elements(), c.misaligned), sum(DType::kFloat64, c.shape.c),
      dot(DType::kFloat64, c.shape.c);
  BatchNormActBackwardReduceParams r;
  r.dtype = c.dtype, r.shape = c.shape;
  r.grad = run.grad.data(), r.x = run.x.data();
  r.mean = run.mean.data(), r.invstd = run.invstd.data();
  r.weight = c.affine ? run.weight.data() : nullptr, r.bias = c.affine ? run.bias.data() : nullptr;
  r.mask = run.saves_mask() ? static_cast<const uint8_t*>(run.mask.data()) : nullptr;
  r.masked = masked.data();
  r.sum = static_cast<double*>(sum.data()), r.dot = static_cast<double*>(dot.data());
  r.relu = c.relu;
  Buffer scratch(batch_norm_act_backward_reduce_scratch_bytes(r));
  r.scratch = scratch.data();
  Status status = launch_batch_norm_act_backward_reduce(r, nullptr);
  check(status.ok(), c.name() + "reduce: " + status.message);
  Tensor sum_in(accumulator_dtype(c.dtype), c.shape.c),
      dot_in(accumulator_dtype(c.dtype), c.shape.c);
  bool same = true;
  for (int64_t ch = 0; ch < c.shape.c; ++ch) {
    same &= sum.get(ch) == run.dbias.get(ch);
    sum_in.set(ch, sum.get(ch)), dot_in.set(ch, dot.get(ch));
  }
  check(same, c.name() + "sums");
  BatchNormActBackwardApplyParams a;
  a.dtype = c.dtype, a.shape = c.shape;
  a.grad = masked.data(), a.x = run.x.data();
  a.mean = run.mean.data(), a.invstd = run.invstd.data(), a.weight = r.weight;
  a.sum = sum_in.data(), a.dot = dot_in.data();
  a.count = static_cast<double>(c.per_channel());
  for (bool over : {false, true}) {
    Tensor dx(c.dtype, c.elements());
    a.dx = over ? masked.data() : dx.data();
    status = launch_batch_norm_act_backward_apply(a, nullptr);
    check(status.ok() && (over ? masked : dx).bytes() == run.dx.bytes(), c.name() + "apply");
  }
}

void test_case(const Case& c) {
  test_over_grad(c);
  if (!c.training) return;
  Run run(c);
  check(launch_batch_norm_act(run.forward_params(), nullptr).ok(), c.name() + "forward");
  check(run.backward(run.backward_params()).ok(), c.name() + "backward");
  test_statistics(run);
  test_backward(run);
}

}  // namespace

void test_phases() {
  int index = 0;
  for (int64_t channels : {1, 7, 64, 130})
    for (auto [n, inner] : {std::pair<int64_t, int64_t>{9, 1}, {5, 49}, {3, 64}})
      for (Layout layout : {Layout::kContiguous, Layout::kChannelsLast})
        for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
          Case c;
          c.dtype = dtype;
          c.shape = {n, channels, inner, layout};
          const int flags = index / 8 * 5 + index;
          c.training = flags % 3 != 0;
          c.residual = flags / 2 % 2 == 0;
          c.relu = flags / 4 % 4 != 0;
          c.affine = flags / 8 % 3 != 0;
          c.misaligned = flags / 3 % 5 == 0;
          emu::set_options({static_cast<uint64_t>(index), false, index % 3 ? 3 : 132});
          test_case(c);
          ++index;
        }
}

}  // namespace resnet_fast::test
