// Registers the backward of deform_sample for CUDA tensors.
#include "deform_sample.h"

namespace dat {
namespace {

template <typename T, typename Real = typename RealOf<T>::type>
cudaError_t launch_backward(
    const PointsArguments& args, const Tensor& grad, bool deterministic, Tensor& grad_value, Tensor& grad_locations,
    Tensor& grad_weights) {
  const Geometry& g = args.geometry;
  const bool weighted = args.weights.has_value();
  const auto in = args.input<Real>();
  std::optional<Tensor> pixels;
  if (deterministic) pixels = empty(grad_locations, grad_locations.sizes());
  const PointsGrads<Real> grads = {
      mutable_data<Real>(grad_locations),
      weighted ? mutable_data<Real>(grad_weights) : nullptr,
      {mutable_data<Real>(pixels), nullptr}};
  Real* sums = deterministic ? nullptr : mutable_data<Real>(grad_value);
  const auto run = weighted ? run_backward<WeightedPoints, T, Real, decltype(in), decltype(grads)>
                            : run_backward<LonePoints, T, Real, decltype(in), decltype(grads)>;
  const bool wide = aligned(args.value) && aligned(grad);
  const cudaError_t error = run(g, in, grads, data<T>(grad), data<T>(args.value), sums, wide, current_stream(grad));
  if (error != cudaSuccess || !deterministic) return error;
  return sum_deterministically(g, *pixels, args.weights, !weighted, grad, grad_value);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes,
    bool align_corners, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const PointsArguments args(value, locations, weights, shapes, align_corners);
  const Geometry& g = args.geometry;
  grad = weights ? checked_grad(kDeformSample, value, grad, {g.B, g.Q, g.H, g.D})
                 : checked_grad(kDeformSample, value, grad, {g.B, g.Q, g.H, g.L, g.P, g.D});
  Tensor grad_value = zero_sums(kDeformSample, value);
  Tensor grad_locations = empty(args.locations, args.locations.sizes());
  const std::vector<int64_t> none = {0};
  Tensor grad_weights = empty(args.locations, weights ? weights->sizes() : none);
  with_type(kDeformSample, value, [&]<typename T>(T) {
    check_launch(
        kDeformSample, value, launch_backward<T>(args, grad, deterministic, grad_value, grad_locations, grad_weights));
  });
  if (grad_value.scalar_type() != value.scalar_type()) grad_value = torch::stable::to(grad_value, value.scalar_type());
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) { m.impl("deform_sample_backward", TORCH_BOX(&dat::backward)); }
