// SPDX-License-Identifier: BSD-3-Clause
// Bytes moved and sector efficiency on ResNet-50's layers: performance that needs no GPU. The
// figures are those of the kernels' header comments; what is read again from L1 or L2 (parameters)
// is counted apart by the emulator.
#include "emulator/emulator.h"
#include "harness.h"

namespace resnet_fast::test {
namespace {

void check_traffic(const std::string& what, double expected) {
  emu::Counters sum;
  for (const auto& [name, c] : emu::counters()) {
    sum.bytes_read += c.bytes_read, sum.sectors_read += c.sectors_read;
    sum.bytes_written += c.bytes_written, sum.sectors_written += c.sectors_written;
    sum.shared_accesses += c.shared_accesses, sum.bank_conflicts += c.bank_conflicts;
  }
  const double moved = static_cast<double>(sum.bytes_read + sum.bytes_written);
  const double used = moved / (32.0 * static_cast<double>(sum.sectors_read + sum.sectors_written));
  char line[256];
  std::snprintf(
      line, sizeof line,
      ": moved %.0f bytes, formula %.0f (%+.1f %%); %.1f %% of the sectors used (read %.1f, "
      "written %.1f); bank conflicts %.1f %%",
      moved, expected, 100 * (moved / expected - 1), 100 * used, 100 * sum.read_efficiency(),
      100 * sum.write_efficiency(),
      100.0 * static_cast<double>(sum.bank_conflicts) /
          static_cast<double>(std::max<int64_t>(1, sum.shared_accesses)));
  check(std::abs(moved / expected - 1) <= 0.02 && used >= 0.95 &&
            sum.bank_conflicts * 10 <= sum.shared_accesses,
        what + line);
  if (std::getenv("RESNET_FAST_SHOW_TRAFFIC")) std::printf("%s%s\n", what.c_str(), line);
  emu::reset_counters();
}

void test_layer(DType dtype, const Shape& shape, bool residual, bool training) {
  const int64_t elements = elements_of(shape);
  const auto e = static_cast<double>(elements), b = static_cast<double>(size_of(dtype)),
             a = static_cast<double>(accumulator_size(dtype)), c = static_cast<double>(shape.c);
  const std::string name = std::string(name_of(dtype)) + " N" + std::to_string(shape.n) + " C" +
                           std::to_string(shape.c) + " HW" + std::to_string(shape.inner) +
                           (shape.layout == Layout::kChannelsLast ? " channels_last" : " nchw") +
                           (residual ? " residual" : "") + (training ? " training" : " eval");
  Tensor x(dtype, elements), r(dtype, elements), y(dtype, elements), dx(dtype, elements),
      dr(dtype, elements);
  Tensor weight(accumulator_dtype(dtype), shape.c), bias(accumulator_dtype(dtype), shape.c),
      mean(accumulator_dtype(dtype), shape.c), invstd(accumulator_dtype(dtype), shape.c),
      running_mean(accumulator_dtype(dtype), shape.c), dweight(accumulator_dtype(dtype), shape.c),
      running_var(accumulator_dtype(dtype), shape.c), dbias(accumulator_dtype(dtype), shape.c);
  Buffer mask(mask_bytes(elements));
  auto* bits = residual ? static_cast<uint8_t*>(mask.data()) : nullptr;
  const double mask_size = residual ? e / 8 : 0, residual_size = residual ? b * e : 0;

  BatchNormActParams f;
  f.dtype = dtype, f.shape = shape, f.training = training;
  f.x = x.data(), f.residual = residual ? r.data() : nullptr, f.y = y.data(), f.mask = bits;
  f.weight = weight.data(), f.bias = bias.data(), f.mean = mean.data(), f.invstd = invstd.data();
  f.running_mean = running_mean.data(), f.running_var = running_var.data();
  Buffer scratch(batch_norm_act_scratch_bytes(f));
  f.scratch = scratch.data();
  emu::reset_counters();
  if (training) {
    check(launch_bn_stats(f, nullptr).ok(), name);
    check_traffic("bn_stats " + name, b * e + 2 * static_cast<double>(scratch.bytes()) + 6 * a * c);
  }
  check(launch_bn_apply(f, nullptr).ok(), name);
  check_traffic("bn_apply " + name,
                2 * b * e + residual_size + mask_size + (training ? 0 : 2 * a * c));

  BatchNormActBackwardParams g;
  g.dtype = dtype, g.shape = shape, g.training = training;
  g.grad = y.data(), g.x = x.data(), g.mean = mean.data(), g.invstd = invstd.data();
  g.weight = weight.data(), g.bias = bias.data(), g.mask = bits;
  g.dx = dx.data(), g.dresidual = residual ? dr.data() : nullptr;
  g.dweight = dweight.data(), g.dbias = dbias.data();
  Buffer scratch_backward(batch_norm_act_backward_scratch_bytes(g));
  g.scratch = scratch_backward.data();
  check(launch_batch_norm_act_backward(g, nullptr).ok(), name);
  const double partials = static_cast<double>(scratch_backward.bytes()) - 2 * a * c;
  check_traffic("bn_backward " + name, 2 * b * e + mask_size + residual_size +
                                           (training ? 3 : 1) * b * e + 2 * partials + 4 * a * c);
}

// The forward in one launch.
void test_fused_layer(DType dtype, const Shape& shape, bool residual) {
  const int64_t elements = elements_of(shape);
  const auto e = static_cast<double>(elements), b = static_cast<double>(size_of(dtype)),
             c = static_cast<double>(shape.c);
  const DType acc = accumulator_dtype(dtype);
  Tensor x(dtype, elements), r(dtype, elements), y(dtype, elements);
  Tensor weight(acc, shape.c), bias(acc, shape.c), mean(acc, shape.c), invstd(acc, shape.c),
      running_mean(acc, shape.c), running_var(acc, shape.c);
  BatchNormActParams f;
  f.dtype = dtype, f.shape = shape, f.training = true;
  f.x = x.data(), f.residual = residual ? r.data() : nullptr, f.y = y.data();
  f.weight = weight.data(), f.bias = bias.data(), f.mean = mean.data(), f.invstd = invstd.data();
  f.running_mean = running_mean.data(), f.running_var = running_var.data();
  Buffer scratch(batch_norm_act_scratch_bytes(f));
  f.scratch = scratch.data();
  const std::string name = std::string("bn_fused ") + name_of(dtype) + " N" +
                           std::to_string(shape.n) + " C" + std::to_string(shape.c) + " HW" +
                           std::to_string(shape.inner) + (residual ? " residual" : "");
  emu::reset_counters();
  check(launch_batch_norm_act(f, nullptr).ok() && emu::counters("bn_fused").launches == 1, name);
  check_traffic(name, 2 * b * e + (residual ? b * e : 0) +
                          6 * static_cast<double>(accumulator_size(dtype)) * c);
}

void test_add_relu_layer(DType dtype, int64_t elements) {
  const auto e = static_cast<double>(elements), b = static_cast<double>(size_of(dtype));
  const std::string name = std::string(name_of(dtype)) + " " + std::to_string(elements);
  Tensor x(dtype, elements), r(dtype, elements), y(dtype, elements);
  Buffer mask(mask_bytes(elements));
  auto* bits = static_cast<uint8_t*>(mask.data());
  emu::reset_counters();
  check(launch_add_relu({dtype, elements, x.data(), r.data(), y.data(), bits}, nullptr).ok(), name);
  check_traffic("add_relu " + name, 3 * b * e + e / 8);
  check(launch_add_relu_backward({dtype, elements, x.data(), bits, y.data()}, nullptr).ok(), name);
  check_traffic("add_relu_backward " + name, 2 * b * e + e / 8);
}

// layers: their channels and the size of their planes.
using Layers = std::vector<std::pair<int64_t, int64_t>>;

void test_layers(const Layers& layers, const std::vector<Shape>& fused) {
  // A quarter of an H200, and images so few that a layer is one to a few megabytes.
  emu::set_options({1, true, 33});
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (auto [channels, inner] : layers)
      for (Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
        const int64_t images =
            std::max<int64_t>(inner == 784 || inner == 196 ? 4 : 1, 250000 / (channels * inner));
        const bool residual = channels >= 256;
        test_layer(dtype, {images, channels, inner, layout}, residual, true);
        if (dtype == DType::kBFloat16)
          test_layer(dtype, {images, channels, inner, layout}, residual, false);
      }
    for (const Shape& shape : fused)
      for (bool residual : {false, true}) test_fused_layer(dtype, shape, residual);
  }
}

}  // namespace

// Planes and columns, planes that end between two vectors, with and without a residual.
void test_traffic() {
  test_layers({{64, 3136}, {256, 3136}, {128, 784}, {256, 196}, {2048, 49}},
              {{32, 512, 49, Layout::kChannelsLast}, {8, 256, 196, Layout::kChannelsLast}});
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    test_add_relu_layer(dtype, 256 * 56 * 56);
    test_add_relu_layer(dtype, 2048 * 49);
  }
}

// The other layers of ResNet-50.
void test_more_traffic() {
  test_layers({{64, 12544}, {512, 784}, {1024, 196}, {512, 49}},
              {{32, 2048, 49, Layout::kChannelsLast}});
}

}  // namespace resnet_fast::test
