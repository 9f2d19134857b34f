// Registers deform_sample and its backward for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "registration.h"

namespace dat {
namespace {

constexpr const char* kOp = "deform_sample";

// The tensors of a call, contiguous, and the levels that its arguments point to.
struct Inputs {
  std::vector<Level> levels;
  Tensor value, locations;
  std::optional<Tensor> weights;
  SampleArgs args;

  Inputs(
      const Tensor& value_, const Tensor& locations_, const std::optional<Tensor>& weights_,
      const std::vector<int64_t>& shapes, bool align_corners)
      : levels(check_value(kOp, value_, shapes)),
        value(torch::stable::contiguous(value_)),
        locations(torch::stable::contiguous(locations_)),
        weights(contiguous(weights_)) {
    const int64_t B = value.size(0), H = value.size(2), L = static_cast<int64_t>(levels.size());
    check_shape(kOp, locations, "locations", {B, kAny, H, L, kAny, 2});
    check_real(kOp, value, locations, "locations");
    const int64_t Q = locations.size(1), P = locations.size(4);
    if (weights) {
      check_shape(kOp, *weights, "weights", {B, Q, H, L, P});
      check_real(kOp, value, *weights, "weights");
    }
    args = make_args(kOp, value, levels, Q, P);
    args.align_corners = align_corners, args.weighted = weights.has_value();
    args.locations = locations.const_data_ptr();
    args.weights = weights ? weights->const_data_ptr() : nullptr;
  }
};

Tensor forward(
    Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes, bool align_corners) {
  const Inputs inputs(value, locations, weights, shapes, align_corners);
  const SampleArgs& args = inputs.args;
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
  const Inputs inputs(value, locations, weights, shapes, align_corners);
  const SampleArgs& args = inputs.args;
  if (weights)
    check_shape(kOp, grad, "grad", {args.B, args.Q, args.H, args.D});
  else
    check_shape(kOp, grad, "grad", {args.B, args.Q, args.H, args.L, args.P, args.D});
  check_dtype(kOp, grad, "grad", value, "value");
  grad = torch::stable::contiguous(grad);
  Tensor grad_value = torch::stable::empty_like(inputs.value);
  Tensor grad_locations = torch::stable::empty_like(inputs.locations);
  Tensor grad_weights = weights ? torch::stable::empty_like(*inputs.weights) : torch::stable::new_empty(locations, {0});
  SampleGrads grads = {};
  grads.out = grad.const_data_ptr();
  grads.grad_locations = grad_locations.mutable_data_ptr();
  grads.grad_weights = grad_weights.mutable_data_ptr();
  sample_backward(args, grads, grad_value.mutable_data_ptr());
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("deform_sample", TORCH_BOX(&dat::forward));
  m.impl("deform_sample_backward", TORCH_BOX(&dat::backward));
}
