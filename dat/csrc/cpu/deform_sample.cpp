// Registers deform_sample and its backward for CPU tensors: allocation, threads and the choice of instruction set.
#include "deform_sample.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace dat {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const SampleKernels& kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512_kernels();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return avx2_kernels();
#endif
  return baseline_kernels();
}

ValueType value_type(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float: return ValueType::kFloat32;
    case ScalarType::Double: return ValueType::kFloat64;
    case ScalarType::BFloat16: return ValueType::kBFloat16;
    case ScalarType::Half: return ValueType::kFloat16;
    default: STD_TORCH_CHECK(false, "deform_sample: value must be float32, float64, bfloat16 or float16");
  }
}

std::vector<Level> make_levels(const std::vector<int64_t>& shapes, int64_t S) {
  // Rows are counted in 32 bits; bytes and elements are not.
  STD_TORCH_CHECK(S < INT32_MAX, "deform_sample: the levels must have fewer than 2**31 cells, got ", S);
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t l = 0; l + 1 < shapes.size(); l += 2) {
    levels.push_back({static_cast<int>(shapes[l]), static_cast<int>(shapes[l + 1]), static_cast<int>(start)});
    start += shapes[l] * shapes[l + 1];
  }
  STD_TORCH_CHECK(start == S, "deform_sample: shapes must have S = ", S, " cells, got ", start);
  return levels;
}

SampleArgs make_args(
    const Tensor& value, const Tensor& locations, const std::optional<Tensor>& weights, const std::vector<Level>& levels,
    bool align_corners) {
  const ScalarType real = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      locations.scalar_type() == real && (!weights || weights->scalar_type() == real),
      "deform_sample: locations and weights must be float64 for float64 values, else float32");
  SampleArgs args;
  args.type = value_type(value);
  args.B = value.size(0), args.S = value.size(1), args.H = value.size(2), args.D = value.size(3);
  args.Q = locations.size(1), args.L = static_cast<int64_t>(levels.size()), args.P = locations.size(4);
  args.levels = levels.data();
  args.align_corners = align_corners, args.weighted = weights.has_value();
  args.value = value.const_data_ptr();
  args.locations = locations.const_data_ptr();
  args.weights = weights ? weights->const_data_ptr() : nullptr;
  return args;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor forward(
    Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes, bool align_corners) {
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = contiguous(weights);
  const std::vector<Level> levels = make_levels(shapes, value.size(1));
  const SampleArgs args = make_args(value, locations, weights, levels, align_corners);
  std::vector<int64_t> size = {args.B, args.Q, args.H};
  if (!weights) size.insert(size.end(), {args.L, args.P});
  size.push_back(args.D);
  Tensor out = torch::stable::new_empty(value, size);
  // A thread is worth waking for some ten microseconds of work.
  const int64_t row_work = std::max<int64_t>(1, args.H * args.L * args.P * (args.D + 16));
  const int64_t grain = std::max<int64_t>(1, 65536 / row_work);
  const size_t scratch_bytes = 12 * (args.L * args.P + kMaxLanes) * sizeof(double);
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, args.B * args.Q, grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> scratch(new char[scratch_bytes]);
    kernels().forward(args, to, scratch.get(), begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes,
    bool align_corners, bool deterministic) {
  grad = torch::stable::contiguous(grad);
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = contiguous(weights);
  const std::vector<Level> levels = make_levels(shapes, value.size(1));
  const SampleArgs args = make_args(value, locations, weights, levels, align_corners);
  Tensor by_value = torch::stable::new_zeros(value, value.sizes(), locations.scalar_type());
  Tensor by_locations = torch::stable::empty_like(locations);
  Tensor by_weights = weights ? torch::stable::empty_like(*weights) : torch::stable::new_empty(locations, {0});
  SampleGrads grads;
  grads.out = grad.const_data_ptr();
  grads.by_value = by_value.mutable_data_ptr();
  grads.by_locations = by_locations.mutable_data_ptr();
  grads.by_weights = by_weights.mutable_data_ptr();
  // Whole heads read and write a query's samples together; where they are too few to share out evenly, single levels.
  const int64_t heads = args.B * args.H;
  const int64_t together = heads >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ? args.L : 1;
  torch::stable::parallel_for(0, heads * (args.L / together), 1, [&](int64_t begin, int64_t end) {
    kernels().backward(args, grads, together, begin, end);
  });
  if (by_value.scalar_type() != value.scalar_type()) by_value = torch::stable::to(by_value, value.scalar_type());
  return {by_value, by_locations, by_weights};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("deform_sample", TORCH_BOX(&dat::forward));
  m.impl("deform_sample_backward", TORCH_BOX(&dat::backward));
}
