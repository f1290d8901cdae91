// SPDX-License-Identifier: BSD-3-Clause
#include "batch_norm_case.h"
#include "emulator/emulator.h"

namespace resnet_fast::test {
namespace {

// The largest error seen, in units of what is allowed; and what it was of.
struct Worst {
  double ratio = 0;
  void see(double got, double want, double allowed) {
    if (std::isnan(got) && std::isnan(want)) return;
    const double error = std::abs(got - want) / allowed;
    ratio = error <= ratio ? ratio : std::isnan(error) ? INFINITY : error;
  }
  void report(const std::string& what) const {
    check(ratio <= 1, what + " is off by " + std::to_string(ratio) + " times what is allowed");
  }
};

void check_forward(Run& run, const std::vector<double>& old_mean,
                   const std::vector<double>& old_var) {
  const Case& c = run.c;
  const std::vector<double> x = run.x.values(), y = run.y.values(),
                            residual = run.residual.values();
  const auto n = static_cast<double>(c.per_channel());
  const double acc = accumulator_epsilon(c.dtype), eps = epsilon(c.dtype);
  Worst mean_worst, invstd_worst, running_worst, y_worst;
  bool masks = true;
  const auto* bits = static_cast<const uint8_t*>(run.mask.data());
  for (int64_t ch = 0; ch < c.shape.c; ++ch) {
    double mean = old_mean[ch], var = old_var[ch];
    if (c.training) {
      const Moments exact = moments(c, x, ch);
      mean = static_cast<double>(exact.mean);
      var = static_cast<double>(exact.m2 / static_cast<long double>(n));
      running_worst.see(run.running_mean.get(ch), 0.9 * old_mean[ch] + 0.1 * mean,
                        4 * acc * (std::abs(mean) + 1));
      if (n > 1)
        running_worst.see(run.running_var.get(ch), 0.9 * old_var[ch] + 0.1 * var * n / (n - 1),
                          40 * acc * (var + 4));
    }
    const double invstd = 1 / std::sqrt(var + 1e-5);
    mean_worst.see(run.mean.get(ch), mean,
                   2 * acc * std::abs(mean) + 4 * acc * std::sqrt(var) + 1e-300);
    invstd_worst.see(run.invstd.get(ch), invstd, 20 * acc * invstd);
    const double saved_mean = run.mean.get(ch);
    const double weight = c.affine ? run.weight.get(ch) : 1, bias = c.affine ? run.bias.get(ch) : 0;
    for (int64_t i = 0; i < c.per_channel(); ++i) {
      const int64_t at = c.at(ch, i);
      const double normal = (x[at] - saved_mean) * invstd * weight;
      const double added = c.residual ? residual[at] : 0;
      const double sum = normal + bias + added, got = y[at];
      y_worst.see(got, c.relu && sum <= 0 ? 0 : sum,
                  0.51 * eps * std::abs(sum) +
                      20 * acc * (std::abs(normal) + std::abs(bias) + std::abs(added)) +
                      1.02 * smallest(c.dtype));
      if (run.saves_mask()) masks &= mask_bit(bits, at) == !(got <= 0);
    }
  }
  mean_worst.report(c.name() + "mean");
  invstd_worst.report(c.name() + "invstd");
  running_worst.report(c.name() + "running statistics");
  y_worst.report(c.name() + "y");
  for (int64_t i = c.elements(); run.saves_mask() && i < 8 * mask_bytes(c.elements()); ++i)
    masks &= !mask_bit(bits, i);
  check(masks, c.name() + "mask");
}

void check_backward(Run& run) {
  const Case& c = run.c;
  const std::vector<double> x = run.x.values(), y = run.y.values(), grad = run.grad.values(),
                            dx = run.dx.values(), dres = run.dresidual.values();
  const auto n = static_cast<double>(c.per_channel());
  const double acc = accumulator_epsilon(c.dtype), eps = epsilon(c.dtype);
  Worst dx_worst, dweight_worst, dbias_worst;
  bool dresidual = true;
  for (int64_t ch = 0; ch < c.shape.c; ++ch) {
    const double mean = run.mean.get(ch), invstd = run.invstd.get(ch);
    const double scale = invstd * (c.affine ? run.weight.get(ch) : 1);
    double sum = 0, dot = 0, sum_abs = 0, dot_abs = 0;
    const auto masked = [&](int64_t at) {
      const bool pass = !c.relu || !(y[at] <= 0);
      return pass ? grad[at] : 0;
    };
    for (int64_t i = 0; i < c.per_channel(); ++i) {
      const double g = masked(c.at(ch, i)), d = x[c.at(ch, i)] - mean;
      sum += g, dot += g * d;
      sum_abs += std::abs(g), dot_abs += std::abs(g * d);
      if (c.residual) dresidual &= dres[c.at(ch, i)] == g;
    }
    dbias_worst.see(run.dbias.get(ch), sum, 20 * acc * sum_abs + 1e-300);
    dweight_worst.see(run.dweight.get(ch), dot * invstd, 20 * acc * dot_abs * invstd + 1e-300);
    for (int64_t i = 0; i < c.per_channel(); ++i) {
      const int64_t at = c.at(ch, i);
      const double g = masked(at), d = x[at] - mean, slope = invstd * invstd / n;
      const double want = c.training ? scale * (g - sum / n - d * slope * dot) : scale * g;
      const double size = std::abs(g) + sum_abs / n + std::abs(d) * slope * dot_abs;
      dx_worst.see(dx[at], want,
                   0.51 * eps * std::abs(want) + 20 * acc * std::abs(scale) * size +
                       1.02 * smallest(c.dtype));
    }
  }
  dx_worst.report(c.name() + "dx");
  dweight_worst.report(c.name() + "dweight");
  dbias_worst.report(c.name() + "dbias");
  if (c.residual) check(dresidual, c.name() + "dresidual");
}

void test_case(const Case& c) {
  Run run(c);
  std::vector<double> old_mean, old_var;
  for (int64_t i = 0; i < c.shape.c; ++i) {
    old_mean.push_back(run.running_mean.get(i));
    old_var.push_back(run.running_var.get(i));
  }
  Status status = launch_batch_norm_act(run.forward_params(), nullptr);
  check(status.ok(), c.name() + status.message);
  check_forward(run, old_mean, old_var);
  status = run.backward(run.backward_params());
  check(status.ok(), c.name() + status.message);
  check_backward(run);
}

// Gradients not asked for change nothing in those that are.
void test_partial_outputs(const Case& c) {
  Run run(c);
  check(launch_batch_norm_act(run.forward_params(), nullptr).ok(), c.name() + "forward");
  check(run.backward(run.backward_params()).ok(), c.name() + "backward");
  const std::string dx = run.dx.bytes(), dresidual = run.dresidual.bytes();
  const std::string dweight = run.dweight.bytes();
  for (int wanted = 0; wanted < 16; ++wanted) {
    BatchNormActBackwardParams p = run.backward_params();
    if (!(wanted & 1)) p.dx = nullptr;
    if (!(wanted & 2) || !c.residual) p.dresidual = nullptr;
    if (!(wanted & 4)) p.dweight = nullptr;
    if (!(wanted & 8)) p.dbias = nullptr;
    const Status status = run.backward(p);
    check(status.ok() && (!p.dx || run.dx.bytes() == dx) &&
              (!p.dresidual || run.dresidual.bytes() == dresidual) &&
              (!p.dweight || run.dweight.bytes() == dweight),
          c.name() + "outputs wanted " + std::to_string(wanted));
  }
}

// The order of threads must not show.
void test_seeds(const Case& c) {
  std::string first;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emu::set_options({seed, false, 132});
    Run run(c);
    check(launch_batch_norm_act(run.forward_params(), nullptr).ok(), c.name() + "forward");
    check(run.backward(run.backward_params()).ok(), c.name() + "backward");
    const std::string all = run.y.bytes() + run.mean.bytes() + run.invstd.bytes() +
                            run.running_var.bytes() + run.dx.bytes() + run.dweight.bytes() +
                            run.dbias.bytes();
    if (seed == 0) first = all;
    check(all == first, c.name() + "seed " + std::to_string(seed) + " differs");
  }
}

// NaN in one channel spreads in that channel alone.
void test_nan(const Case& c) {
  Run run(c);
  run.x.set(c.at(1, 0), std::nan(""));
  check(launch_batch_norm_act(run.forward_params(), nullptr).ok(), c.name() + "forward");
  bool right = true;
  for (int64_t ch = 0; ch < c.shape.c; ++ch)
    for (int64_t i = 0; i < c.per_channel(); ++i)
      right &= std::isnan(run.y.get(c.at(ch, i))) == (ch == 1);
  check(right && std::isnan(run.invstd.get(1)), c.name() + "NaN");
}

// The forward in one launch: slabs with and without a rest of rows, up to the largest.
void test_one_launch() {
  const std::pair<int64_t, int64_t> sizes[] = {{2, 1}, {300, 1}, {5, 49}, {20, 49}, {1, 1024}};
  int index = 0;
  for (auto [n, inner] : sizes)
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (bool residual : {false, true}) {
        emu::set_options({static_cast<uint64_t>(index), false, 4});
        emu::reset_counters();
        Case c;
        c.dtype = dtype;
        c.shape = {n, index % 3 ? 16 : 48, inner, Layout::kChannelsLast};
        c.residual = residual;
        c.relu = !residual && index % 5 != 0;
        c.affine = index % 7 != 0;
        if (index % 4 == 0) c.mean = 1e3;
        test_case(c);
        check(emu::counters("bn_fused").launches == 1 && emu::counters("bn_stats").launches == 0 &&
                  emu::counters("bn_apply").launches == 0,
              c.name() + "is not one launch");
        ++index;
      }
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Case c;
    c.dtype = dtype;
    c.shape = {8, 32, 49, Layout::kChannelsLast};
    c.residual = true, c.relu = false;
    test_seeds(c);
    test_nan(c);
    // One row more than shared memory holds, no whole sectors, planes, and a mask to write.
    for (Shape other :
         {Shape{1, 16, 2049, Layout::kChannelsLast}, Shape{8, 20, 49, Layout::kChannelsLast},
          Shape{8, 32, 49}, Shape{8, 32, 49, Layout::kChannelsLast}}) {
      emu::set_options({1, false, 4});
      emu::reset_counters();
      c.relu = other.layout == Layout::kChannelsLast && other.c == 32;
      c.shape = other;
      test_case(c);
      check(emu::counters("bn_fused").launches == 0, c.name() + "is not for one launch");
    }
  }
}

// Division by multiplication is exact, and large dividends take the true one.
void test_divider() {
  bool exact = true;
  for (int64_t divisor : {1LL, 2LL, 3LL, 7LL, 49LL, 64LL, 1000LL, 12544LL, 2147483647LL})
    for (int64_t largest : {(int64_t{1} << 31) - 1, int64_t{1} << 40}) {
      const Divider divider(divisor, largest);
      for (int64_t step = 0; step < 2000; ++step)
        for (int64_t n : {step, largest - step, largest / 2000 * step, step * divisor % largest,
                          std::max<int64_t>(0, step * divisor % largest - 1)})
          exact &= divider.divide(n) == n / divisor;
    }
  check(exact, "division by multiplication");
}

}  // namespace

void test_batch_norm() {
  test_divider();
  test_one_launch();
  const DType dtypes[] = {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  const Layout layouts[] = {Layout::kContiguous, Layout::kChannelsLast};
  int index = 0;
  for (int64_t channels : {1, 3, 7, 64, 65, 1000})
    for (auto [n, inner] : {std::pair<int64_t, int64_t>{1, 1}, {9, 1}, {1, 49}, {5, 49}, {3, 64}})
      for (Layout layout : layouts)
        for (DType dtype : dtypes) {
          if (channels == 1000 && n * inner > 49 && layout == Layout::kContiguous) continue;
          Case c;
          c.dtype = dtype;
          c.shape = {n, channels, inner, layout};
          // Every pair of flags comes up with every dtype and layout.
          const int flags = index / 8 * 5 + index;
          c.training = flags % 2 == 0;
          c.residual = flags / 2 % 2 == 0;
          c.relu = flags / 4 % 4 != 0;
          c.affine = flags / 8 % 3 != 0;
          c.misaligned = flags / 3 % 5 == 0;
          emu::set_options({static_cast<uint64_t>(index), false, index % 3 ? 3 : 132});
          test_case(c);
          ++index;
        }
  // Many sweeps, with grids whose width must be a multiple of an awkward C.
  for (DType dtype : dtypes)
    for (int64_t channels : {24, 65, 1009})
      for (Layout layout : layouts) {
        emu::set_options({5, false, 1});
        Case c;
        c.dtype = dtype;
        c.shape = {4, channels, 25, layout};
        c.residual = channels == 24;
        test_case(c);
      }
  for (DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (Layout layout : layouts)
      for (bool training : {false, true})
        for (bool residual : {false, true}) {
          emu::set_options({1, false, 4});
          Case c;
          c.dtype = dtype;
          c.shape = {3, 24, 25, layout};
          c.training = training;
          c.residual = residual;
          test_partial_outputs(c);
          if (training) test_nan(c);
        }
  for (DType dtype : dtypes)
    for (Layout layout : layouts)
      for (int64_t inner : {49, 64}) {
        Case c;
        c.dtype = dtype;
        c.shape = {8, 64, inner, layout};
        c.residual = inner == 64;
        test_seeds(c);
      }
  for (Layout layout : layouts)
    for (int64_t inner : {49, 64, 400}) {
      emu::set_options({1, false, 8});
      Case c;
      c.shape = {16, 16, inner, layout};
      c.mean = 1e4;
      c.deviation = 1e-2;
      test_case(c);
    }
}

}  // namespace resnet_fast::test
