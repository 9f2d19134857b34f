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

// Arithmetic of `interpolate` on one number at a time. The CPU kernels pass vectors with their own conversions instead.
template <typename Real_>
struct Scalar {
  using Real = Real_;
  using Int = int;
  static DAT_HOST_DEVICE Int truncate(Real x) { return static_cast<int>(x); }
  static DAT_HOST_DEVICE Real to_real(Int x) { return static_cast<Real>(x); }
};

// Linear interpolation along one axis between pixels `low` and `high`, both clamped into the map. A pixel that lies outside
// has weight and slope zero. Slopes are derivatives of the weights by the location. `inside` is not zero where a pixel lies
// inside.
template <typename Real, typename Int>
struct Axis {
  Int low, high;
  Real low_weight, high_weight;
  Real low_slope, high_slope;
  Int inside;
};

// `pixel` is a coordinate in pixels, 0 at the centre of the first; `factor` is its derivative with respect to the location
// that slopes refer to. NaN, infinite and far away pixels are outside, never undefined.
template <typename Number, typename Real = typename Number::Real, typename Int = typename Number::Int>
DAT_HOST_DEVICE Axis<Real, Int> interpolate_pixel(Real pixel, Real factor, Int size) {
  const Real zero = {}, one = zero + 1, before = zero - 2, after = Number::to_real(size + 1);
  const Int none = {}, last = size - 1;
  // The comparison is false for NaN, which becomes -2: two pixels before the map, where nothing is sampled.
  pixel = pixel > before ? pixel : before;
  pixel = pixel < after ? pixel : after;
  // Truncation and a correction: floor() is a library call on machines without SSE4.1.
  Int low = Number::truncate(pixel);
  low = pixel < Number::to_real(low) ? low - 1 : low;
  const Int high = low + 1;
  const Real fraction = pixel - Number::to_real(low);
  const auto has_low = (low >= none) & (low <= last), has_high = (high >= none) & (high <= last);
  Axis<Real, Int> axis;
  axis.low_weight = has_low ? one - fraction : zero;
  axis.high_weight = has_high ? fraction : zero;
  axis.low_slope = has_low ? -factor : zero;
  axis.high_slope = has_high ? factor : zero;
  axis.inside = (has_low | has_high) ? none + 1 : none;
  // An empty map has no pixel to clamp to, and none of its rows is read.
  axis.low = low < none ? none : low;
  axis.low = axis.low > last ? last : axis.low;
  axis.high = high < none ? none : high;
  axis.high = axis.high > last ? last : axis.high;
  return axis;
}

// `location` runs from 0 to 1 across `size` pixels.
template <typename Number, typename Real = typename Number::Real, typename Int = typename Number::Int>
DAT_HOST_DEVICE Axis<Real, Int> interpolate(Real location, Int size, bool align_corners) {
  const Real zero = {}, one = zero + 1;
  const Real factor = Number::to_real(align_corners ? size - 1 : size);
  const Real pixel = location * factor - (align_corners ? zero : one / 2);
  return interpolate_pixel<Number, Real, Int>(pixel, factor, size);
}

// Gradients of one sample by its location and weight, from the inner products of the output's gradient with the four corner
// rows (corner 2 * i + j is row i, column j). The location's are still to be multiplied by the sample's weight.
template <typename Real>
struct SampleGrad {
  Real x, y, weight;
};

template <typename Real, typename Int>
DAT_HOST_DEVICE SampleGrad<Real> sample_grad(const Axis<Real, Int>& x, const Axis<Real, Int>& y, const Real (&dot)[4]) {
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
