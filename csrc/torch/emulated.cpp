// SPDX-License-Identifier: BSD-3-Clause
// The test module: the emulator's options and counters and the launch plan of a shape, from
// Python. Importing it also registers the emulated operators (gpu/), which are linked in: both must
// see the same emulator. No torch headers here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "emulator/emulator.h"
#include "kernels/bn_apply.cuh"
#include "kernels/bn_backward.cuh"
#include "kernels/bn_stats.cuh"
#include "launch/bn_fused.h"
#include "launch/reduce.h"
#include "launch/sweep.h"

namespace py = pybind11;

namespace resnet_fast {
namespace {

using Numbers = std::map<std::string, int64_t>;

DType dtype_named(const std::string& name) {
  if (name == "float64") return DType::kFloat64;
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype must be float64, float32, float16 or bfloat16; got " + name);
}

template <class Function>
Numbers with_type(const std::string& dtype, const Function& function) {
  Numbers result;
  const Status status = with_dtype(dtype_named(dtype), [&](auto tag) {
    result = function(tag);
    return Status{};
  });
  if (!status.ok()) throw std::runtime_error(status.message);
  return result;
}

Shape make_shape(int64_t n, int64_t c, int64_t inner, bool channels_last) {
  return {n, c, inner, channels_last ? Layout::kChannelsLast : Layout::kContiguous};
}

// The plan for tensors aligned to 16 bytes.
template <template <class, int> class Op>
Numbers reduce_plan(const std::string& dtype, const Shape& shape) {
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto unroll = [](int v) { return v == 1 ? Op<T, 1>::kU : Op<T, kVector<T>>::kU; };
    const ReducePlan plan = plan_reduce(shape, kVector<T>, unroll, Op<T, 1>::kBlocksPerSm);
    const ReduceShape& s = plan.shape;
    return Numbers{{"vector", plan.vector}, {"blocks_x", plan.blocks_x}, {"splits", plan.splits},
                   {"rows", s.rows},        {"threads_x", s.threads_x},  {"threads_y", s.threads_y},
                   {"unroll", s.unroll},    {"tiles", s.tiles}};
  });
}

Numbers sweep_plan(const std::string& dtype, const Shape& shape, int blocks_per_sm) {
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SweepPlan plan = plan_sweep(shape, kVector<T>, blocks_per_sm);
    return Numbers{
        {"vector", plan.vector}, {"blocks", plan.blocks}, {"channels_last", plan.channels_last}};
  });
}

// blocks: 0 where the forward is not one launch.
Numbers fused_plan(const std::string& dtype, const Shape& shape) {
  return with_type(dtype, [&](auto tag) {
    const FusedPlan plan = plan_fused<typename decltype(tag)::type>(shape);
    return Numbers{{"blocks", plan.blocks},
                   {"rows", plan.rows},
                   {"slab_bytes", static_cast<int64_t>(plan.slab_bytes)}};
  });
}

Numbers launch_plan(const std::string& kernel, const std::string& dtype, int64_t n, int64_t c,
                    int64_t inner, bool channels_last) {
  const Shape shape = make_shape(n, c, inner, channels_last);
  if (n <= 0 || c <= 0 || inner <= 0)
    throw std::invalid_argument("n, c and inner must be positive");
  if (kernel == "bn_stats") return reduce_plan<BnStats>(dtype, shape);
  if (kernel == "bn_grad") return reduce_plan<BnGrad>(dtype, shape);
  if (kernel == "bn_apply") return sweep_plan(dtype, shape, kBnApplyBlocksPerSm);
  if (kernel == "bn_fused") return fused_plan(dtype, shape);
  if (kernel == "bn_grad_apply") return sweep_plan(dtype, shape, kBnGradApplyBlocksPerSm);
  throw std::invalid_argument(
      "kernel must be bn_stats, bn_grad, bn_apply, bn_fused or "
      "bn_grad_apply; got " +
      kernel);
}

Numbers to_numbers(const emu::Counters& c) {
  return {{"launches", c.launches},
          {"bytes_read", c.bytes_read},
          {"sectors_read", c.sectors_read},
          {"bytes_cached", c.bytes_cached},
          {"sectors_cached", c.sectors_cached},
          {"bytes_written", c.bytes_written},
          {"sectors_written", c.sectors_written},
          {"shared_accesses", c.shared_accesses},
          {"bank_conflicts", c.bank_conflicts}};
}

std::map<std::string, Numbers> all_counters() {
  std::map<std::string, Numbers> result;
  for (const auto& [kernel, c] : emu::counters()) result[kernel] = to_numbers(c);
  return result;
}

void set_options(uint64_t seed, bool count, int multiprocessors) {
  if (multiprocessors < 1) throw std::invalid_argument("multiprocessors must be positive");
  emu::set_options({seed, count, multiprocessors});
}

}  // namespace
}  // namespace resnet_fast

PYBIND11_MODULE(_emulated, m) {
  using namespace resnet_fast;
  m.doc() = "The CUDA kernels under the emulator, for tests.";
  m.def("set_options", &set_options, py::arg("seed") = 0, py::arg("count") = true,
        py::arg("multiprocessors") = 132,
        "Order of the threads, whether accesses are counted, size of the card.");
  m.def("counters", &all_counters, "Kernel name -> sums over its launches since the last reset.");
  m.def("reset_counters", &emu::reset_counters, "Start the sums again.");
  m.def("launch_plan", &launch_plan, py::arg("kernel"), py::arg("dtype"), py::arg("n"),
        py::arg("c"), py::arg("inner"), py::arg("channels_last"),
        "How a kernel is laid out over the grid for (n, c, inner) and the options' card.");
}
