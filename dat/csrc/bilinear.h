// Bilinear interpolation of a zero-padded map: corners, weights and their derivatives. The same source for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DAT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DAT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace dat {

// A feature level inside the concatenated rows of `value`.
struct Level {
  int height;
  int width;
  int start;
};

// Linear interpolation along one axis between cells `low` and `high`, both clamped into the map. A cell that lies outside
// has weight and slope zero. Slopes are derivatives of the weights by the location.
template <typename Real>
struct Axis {
  int low, high;
  Real low_weight, high_weight;
  Real low_slope, high_slope;
  bool inside;
};

// `location` runs from 0 to 1 across `size` cells. NaN, infinite and far away locations are outside, never undefined.
template <typename Real>
DAT_HOST_DEVICE Axis<Real> interpolate(Real location, int size, bool align_corners) {
  const Real factor = align_corners ? Real(size - 1) : Real(size);
  Real pixel = location * factor - (align_corners ? Real(0) : Real(0.5));
  // The comparison is false for NaN, which goes to -2: two cells before the map, where nothing is sampled.
  pixel = pixel > Real(-2) ? pixel : Real(-2);
  pixel = pixel < Real(size + 1) ? pixel : Real(size + 1);
  // Truncation and a correction: floor() is a library call on machines without SSE4.1 and stops vectorisation.
  int low = static_cast<int>(pixel);
  low -= pixel < Real(low);
  const int high = low + 1;
  const Real fraction = pixel - Real(low);
  const Real has_low = (low >= 0) & (low < size) ? Real(1) : Real(0);
  const Real has_high = (high >= 0) & (high < size) ? Real(1) : Real(0);
  Axis<Real> axis;
  axis.low_weight = (Real(1) - fraction) * has_low;
  axis.high_weight = fraction * has_high;
  axis.low_slope = -factor * has_low;
  axis.high_slope = factor * has_high;
  axis.inside = (high >= 0) & (low < size) & (size > 0);
  const int last = size - 1;
  axis.low = low < 0 ? 0 : (low > last ? last : low);
  axis.high = high < 0 ? 0 : (high > last ? last : high);
  return axis;
}

// Gradients of one sample by its location and weight, from the inner products of the output's gradient with the four corner
// rows (corner 2 * i + j is row i, column j). The location's are still to be multiplied by the sample's weight.
template <typename Real>
struct SampleGrad {
  Real x, y, weight;
};

template <typename Real>
DAT_HOST_DEVICE SampleGrad<Real> sample_grad(const Axis<Real>& x, const Axis<Real>& y, const Real (&dot)[4]) {
  const Real low_row = x.low_weight * dot[0] + x.high_weight * dot[1];
  const Real high_row = x.low_weight * dot[2] + x.high_weight * dot[3];
  SampleGrad<Real> grad;
  grad.weight = y.low_weight * low_row + y.high_weight * high_row;
  grad.y = y.low_slope * low_row + y.high_slope * high_row;
  grad.x = y.low_weight * (x.low_slope * dot[0] + x.high_slope * dot[1]) +
           y.high_weight * (x.low_slope * dot[2] + x.high_slope * dot[3]);
  return grad;
}

}  // namespace dat
