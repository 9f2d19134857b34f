// Registers deform_sample and its backward for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "registration.h"

namespace dat {
namespace {

SampleArgs make_args(
    const Tensor& value, const Tensor& locations, const std::optional<Tensor>& weights, const std::vector<Level>& levels,
    bool align_corners) {
  check_real("deform_sample", value, locations, "locations");
  if (weights) check_real("deform_sample", value, *weights, "weights");
  SampleArgs args = make_args("deform_sample", value, levels, locations.size(1), locations.size(4));
  args.align_corners = align_corners, args.weighted = weights.has_value();
  args.locations = locations.const_data_ptr();
  args.weights = weights ? weights->const_data_ptr() : nullptr;
  return args;
}

Tensor forward(
    Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes, bool align_corners) {
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = contiguous(weights);
  const std::vector<Level> levels = make_levels("deform_sample", shapes, value.size(1));
  const SampleArgs args = make_args(value, locations, weights, levels, align_corners);
  std::vector<int64_t> size = {args.B, args.Q, args.H};
  if (!weights) size.insert(size.end(), {args.L, args.P});
  size.push_back(args.D);
  Tensor out = torch::stable::new_empty(value, size);
  sample_forward(args, out.mutable_data_ptr());
  return out;
}

// The CPU's sums are always taken in a fixed order.
std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes,
    bool align_corners, bool /*deterministic*/) {
  grad = torch::stable::contiguous(grad);
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = contiguous(weights);
  const std::vector<Level> levels = make_levels("deform_sample", shapes, value.size(1));
  const SampleArgs args = make_args(value, locations, weights, levels, align_corners);
  Tensor by_value = torch::stable::empty_like(value);
  Tensor by_locations = torch::stable::empty_like(locations);
  Tensor by_weights = weights ? torch::stable::empty_like(*weights) : torch::stable::new_empty(locations, {0});
  SampleGrads grads = {};
  grads.out = grad.const_data_ptr();
  grads.by_locations = by_locations.mutable_data_ptr();
  grads.by_weights = by_weights.mutable_data_ptr();
  sample_backward(args, grads, by_value.mutable_data_ptr());
  return {by_value, by_locations, by_weights};
}

std::string cpu_capability() { return instruction_set(); }

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_FRAGMENT(dat, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dat, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&dat::cpu_capability)); }

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("deform_sample", TORCH_BOX(&dat::forward));
  m.impl("deform_sample_backward", TORCH_BOX(&dat::backward));
}
