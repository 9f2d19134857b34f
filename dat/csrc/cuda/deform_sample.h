// The tensors of deform_sample, checked and contiguous.
#pragma once

#include "tensors.h"

namespace dat {

constexpr const char* kDeformSample = "deform_sample";

struct PointsArguments {
  Geometry geometry;
  Tensor value, locations;
  std::optional<Tensor> weights;

  PointsArguments(
      const Tensor& value_, const Tensor& locations_, const std::optional<Tensor>& weights_,
      const std::vector<int64_t>& shapes, bool align_corners)
      : geometry(checked_geometry(kDeformSample, value_, shapes, "locations", locations_, align_corners)),
        value(make_contiguous(value_)),
        locations(make_contiguous(locations_)),
        weights(contiguous(weights_)) {
    check_real(kDeformSample, value, locations, "locations");
    if (!weights) return;
    const Geometry& g = geometry;
    check_real(kDeformSample, value, *weights, "weights");
    check_tensor(kDeformSample, "weights", value, *weights, {g.B, g.Q, g.H, g.L, g.P});
  }

  template <typename Real>
  PointsInput<Real> input() const {
    return {data<Real>(locations), data<Real>(weights)};
  }
};

}  // namespace dat
