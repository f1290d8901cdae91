// SPDX-License-Identifier: BSD-3-Clause
#include "emulator/emulator.h"
#include "harness.h"

namespace resnet_fast::test {
namespace {

void test_case(DType dtype, int64_t size, bool misaligned, bool save_mask) {
  const std::string name = std::string("add_relu ") + name_of(dtype) + " " + std::to_string(size) +
                           (misaligned ? " misaligned" : "") + (save_mask ? " mask" : "");
  Tensor x(dtype, size, misaligned), residual(dtype, size), y(dtype, size), dx(dtype, size);
  Tensor grad(dtype, size, misaligned);
  x.fill_normal(1);
  residual.fill_normal(2);
  grad.fill_normal(3);
  if (size > 5) {
    x.set(1, std::nan(""));
    residual.set(2, std::numeric_limits<double>::infinity());
    residual.set(3, -std::numeric_limits<double>::infinity());
    x.set(4, 1.5), residual.set(4, -1.5);
  }
  Buffer mask(save_mask ? mask_bytes(size) : 0);
  auto* bits = save_mask ? static_cast<uint8_t*>(mask.data()) : nullptr;
  const AddReluParams forward{dtype, size, x.data(), residual.data(), y.data(), bits};
  Status status = launch_add_relu(forward, nullptr);
  check(status.ok(), name + ": " + status.message);
  bool exact = true;
  Tensor expected(dtype, 1);
  for (int64_t i = 0; i < size; ++i) {
    expected.set(0, x.get(i) + residual.get(i));
    const double sum = expected.get(0), want = sum <= 0 ? 0 : sum, got = y.get(i);
    exact &= got == want || (std::isnan(got) && std::isnan(want));
    if (save_mask) exact &= mask_bit(bits, i) == !(sum <= 0);
  }
  check(exact, name + ": forward");
  if (!save_mask) return;
  bool padding = true;
  for (int64_t i = size; i < 8 * mask_bytes(size); ++i) padding &= !mask_bit(bits, i);
  check(padding, name + ": padding bits are 0");

  status = launch_add_relu_backward({dtype, size, grad.data(), bits, dx.data()}, nullptr);
  check(status.ok(), name + " backward: " + status.message);
  exact = true;
  for (int64_t i = 0; i < size; ++i) exact &= dx.get(i) == (mask_bit(bits, i) ? grad.get(i) : 0);
  check(exact, name + ": backward");
}

}  // namespace

void test_add_relu() {
  emu::set_options({1, false, 4});
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (int64_t size : {1, 7, 8, 15, 16, 17, 24, 1000, 4096, 40961, 65544})
      for (bool misaligned : {false, true})
        for (bool save_mask : {false, true}) test_case(dtype, size, misaligned, save_mask);
  const Status empty =
      launch_add_relu({DType::kFloat32, 0, nullptr, nullptr, nullptr, nullptr}, nullptr);
  check(empty.ok(), "add_relu of nothing");
}

}  // namespace resnet_fast::test
