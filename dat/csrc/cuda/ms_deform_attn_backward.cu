// Registers the backward of ms_deform_attn for CUDA tensors.
#include "ms_deform_attn.h"

namespace dat {
namespace {

struct Gradients {
  Tensor grad_value, grad_reference, grad_offsets, grad_logits;
};

template <typename T, typename Real = typename RealOf<T>::type>
cudaError_t launch_backward(
    const AttentionArguments& args, const Tensor& grad, bool with_reference, bool deterministic, Gradients& gradients) {
  const Geometry& g = args.geometry;
  const auto in = args.input<Real>();
  const auto scratch = [&](const Tensor& like) { return empty(args.value, like.sizes(), real_type(args.value)); };
  std::optional<Tensor> grad_weights, grad_pixels, pixels, weights;
  AttentionGrads<Real> grads = {};
  grads.grad_offsets = mutable_data<char>(gradients.grad_offsets),
  grads.grad_logits = mutable_data<char>(gradients.grad_logits);
  grad_weights = args.narrow() ? scratch(args.logits) : gradients.grad_logits;
  grads.grad_weights = mutable_data<Real>(grad_weights);
  if (with_reference) grad_pixels = scratch(args.offsets), grads.grad_pixels = mutable_data<Real>(grad_pixels);
  if (deterministic) {
    pixels = scratch(args.offsets), weights = scratch(args.logits);
    grads.kept = {mutable_data<Real>(pixels), mutable_data<Real>(weights)};
  }
  Real* sums = deterministic ? nullptr : mutable_data<Real>(gradients.grad_value);
  const cudaStream_t stream = current_stream(grad);
  const bool wide = aligned(args.value) && aligned(grad);
  cudaError_t error = run_backward<Attention, T, Real>(g, in, grads, data<T>(grad), data<T>(args.value), sums, wide, stream);
  if (error == cudaSuccess && with_reference)
    error =
        run_reference_grad<T, Real>(g, in, data<Real>(grad_pixels), mutable_data<Real>(gradients.grad_reference), stream);
  if (error == cudaSuccess && deterministic)
    error = sum_deterministically(g, *pixels, weights, false, grad, gradients.grad_value);
  return error;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor reference, Tensor offsets, Tensor logits, std::vector<int64_t> shapes,
    bool with_reference, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const AttentionArguments args(value, reference, offsets, logits, shapes);
  const Geometry& g = args.geometry;
  grad = checked_grad(kMSDeformAttn, value, grad, {g.B, g.Q, g.H, g.D});
  const std::vector<int64_t> none = {0};
  Gradients gradients = {
      zero_sums(kMSDeformAttn, value), empty(args.reference, with_reference ? args.reference.sizes() : none),
      empty(args.offsets, args.offsets.sizes()), empty(args.logits, args.logits.sizes())};
  with_type(kMSDeformAttn, value, [&]<typename T>(T) {
    check_launch(kMSDeformAttn, value, launch_backward<T>(args, grad, with_reference, deterministic, gradients));
  });
  auto& [grad_value, grad_reference, grad_offsets, grad_logits] = gradients;
  if (grad_value.scalar_type() != value.scalar_type()) grad_value = torch::stable::to(grad_value, value.scalar_type());
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) { m.impl("ms_deform_attn_backward", TORCH_BOX(&dat::backward)); }
