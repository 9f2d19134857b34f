// Registers ms_deform_attn and its backward for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "registration.h"

namespace dat {
namespace {

constexpr const char* kOp = "ms_deform_attn";

// The tensors of a call, contiguous, and the levels that its arguments point to.
struct Inputs {
  std::vector<Level> levels;
  Tensor value, reference, offsets, logits;
  SampleArgs args;

  Inputs(
      const Tensor& value_, const Tensor& reference_, const Tensor& offsets_, const Tensor& logits_,
      const std::vector<int64_t>& shapes)
      : levels(check_value(kOp, value_, shapes)),
        value(torch::stable::contiguous(value_)),
        reference(torch::stable::contiguous(reference_)),
        offsets(torch::stable::contiguous(offsets_)),
        logits(torch::stable::contiguous(logits_)) {
    const int64_t B = value.size(0), H = value.size(2), L = static_cast<int64_t>(levels.size());
    check_shape(kOp, offsets, "offsets", {B, kAny, H, L, kAny, 2});
    const int64_t Q = offsets.size(1), P = offsets.size(4);
    check_shape(kOp, logits, "logits", {B, Q, H, L, P});
    check_shape(kOp, reference, "reference", {B, Q, L, kAny});
    const int64_t coordinates = reference.size(3);
    STD_TORCH_CHECK(
        coordinates == 2 || coordinates == 4, kOp, ": reference must be points of 2 or boxes of 4 numbers, got ",
        coordinates);
    check_real(kOp, value, reference, "reference");
    args = make_args(kOp, value, levels, Q, P);
    args.narrow = offsets.scalar_type() == value.scalar_type();
    if (!args.narrow) check_real(kOp, value, offsets, "offsets");
    check_dtype(kOp, logits, "logits", offsets, "offsets");
    args.weighted = true;
    args.reference = reference.const_data_ptr(), args.reference_size = reference.size(3);
    args.offsets = offsets.const_data_ptr(), args.logits = logits.const_data_ptr();
  }
};

Tensor forward(Tensor value, Tensor reference, Tensor offsets, Tensor logits, std::vector<int64_t> shapes) {
  const Inputs inputs(value, reference, offsets, logits, shapes);
  const SampleArgs& args = inputs.args;
  Tensor out = torch::stable::new_empty(inputs.value, {args.B, args.Q, args.H, args.D});
  sample_forward(args, out.mutable_data_ptr());
  return out;
}

// The CPU's sums are always taken in a fixed order.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor reference, Tensor offsets, Tensor logits, std::vector<int64_t> shapes,
    bool with_reference, bool /*deterministic*/) {
  const Inputs inputs(value, reference, offsets, logits, shapes);
  const SampleArgs& args = inputs.args;
  check_shape(kOp, grad, "grad", {args.B, args.Q, args.H, args.D});
  check_dtype(kOp, grad, "grad", value, "value");
  grad = torch::stable::contiguous(grad);
  Tensor grad_value = torch::stable::empty_like(inputs.value);
  Tensor grad_offsets = torch::stable::empty_like(inputs.offsets), grad_logits = torch::stable::empty_like(inputs.logits);
  Tensor grad_reference = torch::stable::new_empty(
      inputs.reference,
      with_reference ? std::vector<int64_t>{args.B, args.Q, args.H, args.L, args.reference_size} : std::vector<int64_t>{0});
  SampleGrads grads = {};
  grads.out = grad.const_data_ptr();
  grads.grad_reference = with_reference ? grad_reference.mutable_data_ptr() : nullptr;
  grads.grad_offsets = grad_offsets.mutable_data_ptr(), grads.grad_logits = grad_logits.mutable_data_ptr();
  sample_backward(args, grads, grad_value.mutable_data_ptr());
  if (with_reference) {
    const int64_t heads[] = {2};
    grad_reference = torch::stable::sum(grad_reference, torch::headeronly::IntHeaderOnlyArrayRef(heads, 1));
  }
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&dat::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dat::backward));
}
