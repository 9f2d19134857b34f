// Registers ms_deform_attn and its backward for CUDA tensors.
#include "tensors.h"

namespace dat {
namespace {

constexpr const char* kOp = "ms_deform_attn";

struct Arguments {
  Geometry geometry;
  Tensor value, reference, offsets, logits;

  Arguments(
      const Tensor& value_, const Tensor& reference_, const Tensor& offsets_, const Tensor& logits_,
      const std::vector<int64_t>& shapes)
      : geometry(checked_geometry(kOp, value_, shapes, offsets_.size(1), offsets_.size(4), false)),
        value(torch::stable::contiguous(value_)),
        reference(torch::stable::contiguous(reference_)),
        offsets(torch::stable::contiguous(offsets_)),
        logits(torch::stable::contiguous(logits_)) {
    check_real(kOp, value, reference, "reference");
    const ScalarType type = offsets.scalar_type();
    STD_TORCH_CHECK(
        type == logits.scalar_type() && (type == real_type(value) || type == value.scalar_type()), kOp,
        ": offsets and logits must both be in the dtype of value, or of its sums");
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

struct Gradients {
  Tensor by_value, by_reference, by_offsets, by_logits;
};

Tensor forward(Tensor value, Tensor reference, Tensor offsets, Tensor logits, std::vector<int64_t> shapes) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments args(value, reference, offsets, logits, shapes);
  const Geometry& g = args.geometry;
  Tensor out = torch::stable::new_empty(value, {g.B, g.Q, g.H, g.D});
  with_type(kOp, value, [&]<typename T>(T) {
    const auto in = args.input<typename RealOf<T>::type>();
    const bool wide = aligned(args.value) && aligned(out);
    check_launch(
        kOp, value,
        run_forward<Attention, T>(g, in, data<T>(args.value), mutable_data<T>(out), wide, current_stream(value)));
  });
  return out;
}

template <typename T, typename Real = typename RealOf<T>::type>
cudaError_t launch_backward(
    const Arguments& args, const Tensor& grad, bool with_reference, bool deterministic, Gradients& gradients) {
  const Geometry& g = args.geometry;
  const auto in = args.input<Real>();
  const auto scratch = [&](const Tensor& like) {
    return torch::stable::new_empty(like, like.sizes(), real_type(args.value));
  };
  std::optional<Tensor> by_weights, by_pixels, pixels, weights;
  AttentionGrads<Real> grads = {};
  grads.by_offsets = mutable_data<char>(gradients.by_offsets), grads.by_logits = mutable_data<char>(gradients.by_logits);
  by_weights = args.narrow() ? scratch(args.logits) : gradients.by_logits;
  grads.by_weights = mutable_data<Real>(by_weights);
  if (with_reference) by_pixels = scratch(args.offsets), grads.by_pixels = mutable_data<Real>(by_pixels);
  if (deterministic) {
    pixels = scratch(args.offsets), weights = scratch(args.logits);
    grads.kept = {mutable_data<Real>(pixels), mutable_data<Real>(weights)};
  }
  Real* sums = deterministic ? nullptr : mutable_data<Real>(gradients.by_value);
  const cudaStream_t stream = current_stream(grad);
  const bool wide = aligned(args.value) && aligned(grad);
  cudaError_t error = run_backward<Attention, T, Real>(g, in, grads, data<T>(grad), data<T>(args.value), sums, wide, stream);
  if (error == cudaSuccess && with_reference)
    error = run_reference_grad<T, Real>(g, in, data<Real>(by_pixels), mutable_data<Real>(gradients.by_reference), stream);
  if (error == cudaSuccess && deterministic)
    error = sum_deterministically<T, Real>(g, *pixels, weights, false, grad, gradients.by_value);
  return error;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor reference, Tensor offsets, Tensor logits, std::vector<int64_t> shapes,
    bool with_reference, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments args(value, reference, offsets, logits, shapes);
  grad = torch::stable::contiguous(grad);
  const std::vector<int64_t> none = {0};
  Gradients gradients = {
      torch::stable::new_zeros(value, value.sizes(), real_type(value)),
      torch::stable::new_empty(args.reference, with_reference ? args.reference.sizes() : none),
      torch::stable::new_empty(args.offsets, args.offsets.sizes()),
      torch::stable::new_empty(args.logits, args.logits.sizes())};
  with_type(kOp, value, [&]<typename T>(T) {
    check_launch(kOp, value, launch_backward<T>(args, grad, with_reference, deterministic, gradients));
  });
  auto& [by_value, by_reference, by_offsets, by_logits] = gradients;
  if (by_value.scalar_type() != value.scalar_type()) by_value = torch::stable::to(by_value, value.scalar_type());
  return {by_value, by_reference, by_offsets, by_logits};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&dat::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dat::backward));
}
