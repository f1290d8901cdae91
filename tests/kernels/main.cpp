// SPDX-License-Identifier: BSD-3-Clause
// Runs every kernel under the emulator against plain double-precision loops.
#include <chrono>
#include <random>

#include "harness.h"

namespace resnet_fast::test {
namespace {
int case_count = 0, failure_count = 0;
}

void check(bool ok, const std::string& what) {
  ++case_count;
  if (ok) return;
  ++failure_count;
  std::printf("FAILED %s\n", what.c_str());
}
int failures() { return failure_count; }
int cases() { return case_count; }

void Tensor::fill_normal(uint64_t seed, double mean, double deviation) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal(mean, deviation);
  for (int64_t i = 0; i < size_; ++i) set(i, normal(generator));
}

}  // namespace resnet_fast::test

// Arguments: the suites to run; none: all.
int main(int count, char** names) {
  using namespace resnet_fast::test;
  const std::pair<const char*, void (*)()> suites[] = {
      {"emulator", test_emulator},     {"add_relu", test_add_relu},
      {"batch_norm", test_batch_norm}, {"phases", test_phases},
      {"traffic", test_traffic},       {"more_traffic", test_more_traffic}};
  for (const auto& [name, suite] : suites) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(names[i], name) == 0;
    if (!wanted) continue;
    const auto start = std::chrono::steady_clock::now();
    const int before = cases(), failed_before = failures();
    suite();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-12s %d cases, %d failed, %.1f s\n", name, cases() - before,
                failures() - failed_before, seconds.count());
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", cases() - failures(), failures());
  return failures() ? 1 : 0;
}
