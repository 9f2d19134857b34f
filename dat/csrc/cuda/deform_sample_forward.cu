// Registers deform_sample for CUDA tensors.
#include "deform_sample.h"

namespace dat {
namespace {

Tensor forward(
    Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes, bool align_corners) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const PointsArguments args(value, locations, weights, shapes, align_corners);
  const Geometry& g = args.geometry;
  std::vector<int64_t> size = {g.B, g.Q, g.H};
  if (!weights) size.insert(size.end(), {g.L, g.P});
  size.push_back(g.D);
  Tensor out = empty(value, size);
  const bool wide = aligned(args.value) && aligned(out);
  with_type(kDeformSample, value, [&]<typename T>(T) {
    const auto in = args.input<typename RealOf<T>::type>();
    const auto run = weights ? run_forward<WeightedPoints, T, decltype(in)> : run_forward<LonePoints, T, decltype(in)>;
    check_launch(kDeformSample, value, run(g, in, data<T>(args.value), mutable_data<T>(out), wide, current_stream(value)));
  });
  return out;
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) { m.impl("deform_sample", TORCH_BOX(&dat::forward)); }
