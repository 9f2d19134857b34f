// Registers ms_deform_attn and its backward for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "registration.h"

namespace dat {
namespace {

// The tensors of a call, contiguous, and the levels that its arguments point to.
struct Inputs {
  Tensor value, reference, offsets, logits;
  std::vector<Level> levels;
  SampleArgs args;

  Inputs(
      const Tensor& value_, const Tensor& reference_, const Tensor& offsets_, const Tensor& logits_,
      const std::vector<int64_t>& shapes)
      : value(torch::stable::contiguous(value_)),
        reference(torch::stable::contiguous(reference_)),
        offsets(torch::stable::contiguous(offsets_)),
        logits(torch::stable::contiguous(logits_)),
        levels(make_levels("ms_deform_attn", shapes, value.size(1))),
        args(make_args("ms_deform_attn", value, levels, offsets.size(1), offsets.size(4))) {
    check_real("ms_deform_attn", value, reference, "reference");
    args.narrow = offsets.scalar_type() == value.scalar_type();
    if (!args.narrow) check_real("ms_deform_attn", value, offsets, "offsets");
    STD_TORCH_CHECK(logits.scalar_type() == offsets.scalar_type(), "ms_deform_attn: logits must be in the dtype of offsets");
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
  grad = torch::stable::contiguous(grad);
  Tensor by_value = torch::stable::empty_like(inputs.value);
  Tensor by_offsets = torch::stable::empty_like(inputs.offsets), by_logits = torch::stable::empty_like(inputs.logits);
  Tensor by_reference = torch::stable::new_empty(
      inputs.reference,
      with_reference ? std::vector<int64_t>{args.B, args.Q, args.H, args.L, args.reference_size} : std::vector<int64_t>{0});
  SampleGrads grads = {};
  grads.out = grad.const_data_ptr();
  grads.by_reference = with_reference ? by_reference.mutable_data_ptr() : nullptr;
  grads.by_offsets = by_offsets.mutable_data_ptr(), grads.by_logits = by_logits.mutable_data_ptr();
  sample_backward(args, grads, by_value.mutable_data_ptr());
  if (with_reference) {
    const int64_t heads[] = {2};
    by_reference = torch::stable::sum(by_reference, torch::headeronly::IntHeaderOnlyArrayRef(heads, 1));
  }
  return {by_value, by_reference, by_offsets, by_logits};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&dat::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dat::backward));
}
