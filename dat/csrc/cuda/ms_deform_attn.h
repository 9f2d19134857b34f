// The tensors of ms_deform_attn, checked and contiguous.
#pragma once

#include "tensors.h"

namespace dat {

constexpr const char* kMSDeformAttn = "ms_deform_attn";

struct AttentionArguments {
  Geometry geometry;
  Tensor value, reference, offsets, logits;

  AttentionArguments(
      const Tensor& value_, const Tensor& reference_, const Tensor& offsets_, const Tensor& logits_,
      const std::vector<int64_t>& shapes)
      : geometry(checked_geometry(kMSDeformAttn, value_, shapes, "offsets", offsets_, false)),
        value(make_contiguous(value_)),
        reference(make_contiguous(reference_)),
        offsets(make_contiguous(offsets_)),
        logits(make_contiguous(logits_)) {
    check_real(kMSDeformAttn, value, reference, "reference");
    const ScalarType type = offsets.scalar_type();
    STD_TORCH_CHECK(
        type == logits.scalar_type() && (type == real_type(value) || type == value.scalar_type()), kMSDeformAttn,
        ": offsets and logits must both be in the dtype of value, or of its sums");
    const Geometry& g = geometry;
    check_dimensions(kMSDeformAttn, "reference", reference, 4);
    const int64_t components = reference.size(3) == 4 ? 4 : 2;
    check_tensor(kMSDeformAttn, "reference", value, reference, {g.B, g.Q, g.L, components});
    check_tensor(kMSDeformAttn, "logits", value, logits, {g.B, g.Q, g.H, g.L, g.P});
  }

  template <typename Real>
  AttentionInput<Real> input() const {
    AttentionInput<Real> in = {};
    in.reference = data<Real>(reference);
    in.offsets = data<char>(offsets), in.logits = data<char>(logits);
    in.narrow = narrow();
    in.boxes = reference.size(3) == 4;
    in.box_share = Real(0.5) / static_cast<Real>(std::max(1, geometry.P));
    return in;
  }
  bool narrow() const { return offsets.scalar_type() != real_type(value); }
};

}  // namespace dat
