// Registers deform_sample and its backward for CUDA tensors.
#include "tensors.h"

namespace dat {
namespace {

constexpr const char* kOp = "deform_sample";

struct Arguments {
  Geometry geometry;
  Tensor value, locations;
  std::optional<Tensor> weights;

  Arguments(
      const Tensor& value_, const Tensor& locations_, const std::optional<Tensor>& weights_,
      const std::vector<int64_t>& shapes, bool align_corners)
      : geometry(checked_geometry(kOp, value_, shapes, locations_.size(1), locations_.size(4), align_corners)),
        value(torch::stable::contiguous(value_)),
        locations(torch::stable::contiguous(locations_)),
        weights(contiguous(weights_)) {
    check_real(kOp, value, locations, "locations");
    if (weights) check_real(kOp, value, *weights, "weights");
  }

  template <typename Real>
  PointsInput<Real> input() const {
    return {data<Real>(locations), data<Real>(weights)};
  }
};

Tensor forward(
    Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes, bool align_corners) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments args(value, locations, weights, shapes, align_corners);
  const Geometry& g = args.geometry;
  std::vector<int64_t> size = {g.B, g.Q, g.H};
  if (!weights) size.insert(size.end(), {g.L, g.P});
  size.push_back(g.D);
  Tensor out = torch::stable::new_empty(value, size);
  const bool wide = aligned(args.value) && aligned(out);
  with_type(kOp, value, [&]<typename T>(T) {
    const auto in = args.input<typename RealOf<T>::type>();
    const auto run = weights ? run_forward<WeightedPoints, T, decltype(in)> : run_forward<LonePoints, T, decltype(in)>;
    check_launch(kOp, value, run(g, in, data<T>(args.value), mutable_data<T>(out), wide, current_stream(value)));
  });
  return out;
}

template <typename T, typename Real = typename RealOf<T>::type>
cudaError_t launch_backward(
    const Arguments& args, const Tensor& grad, bool deterministic, Tensor& by_value, Tensor& by_locations,
    Tensor& by_weights) {
  const Geometry& g = args.geometry;
  const bool weighted = args.weights.has_value();
  const auto in = args.input<Real>();
  std::optional<Tensor> pixels;
  if (deterministic) pixels = torch::stable::empty_like(by_locations);
  const PointsGrads<Real> grads = {
      mutable_data<Real>(by_locations),
      weighted ? mutable_data<Real>(by_weights) : nullptr,
      {mutable_data<Real>(pixels), nullptr}};
  Real* sums = deterministic ? nullptr : mutable_data<Real>(by_value);
  const auto run = weighted ? run_backward<WeightedPoints, T, Real, decltype(in), decltype(grads)>
                            : run_backward<LonePoints, T, Real, decltype(in), decltype(grads)>;
  const bool wide = aligned(args.value) && aligned(grad);
  const cudaError_t error = run(g, in, grads, data<T>(grad), data<T>(args.value), sums, wide, current_stream(grad));
  if (error != cudaSuccess || !deterministic) return error;
  return sum_deterministically<T, Real>(g, *pixels, args.weights, !weighted, grad, by_value);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes,
    bool align_corners, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments args(value, locations, weights, shapes, align_corners);
  grad = torch::stable::contiguous(grad);
  Tensor by_value = torch::stable::new_zeros(value, value.sizes(), real_type(value));
  Tensor by_locations = torch::stable::new_empty(args.locations, args.locations.sizes());
  const std::vector<int64_t> none = {0};
  Tensor by_weights = torch::stable::new_empty(args.locations, weights ? weights->sizes() : none);
  with_type(kOp, value, [&]<typename T>(T) {
    check_launch(kOp, value, launch_backward<T>(args, grad, deterministic, by_value, by_locations, by_weights));
  });
  if (by_value.scalar_type() != value.scalar_type()) by_value = torch::stable::to(by_value, value.scalar_type());
  return {by_value, by_locations, by_weights};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) {
  m.impl("deform_sample", TORCH_BOX(&dat::forward));
  m.impl("deform_sample_backward", TORCH_BOX(&dat::backward));
}
