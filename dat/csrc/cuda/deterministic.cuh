// Gradient by value in a fixed order: samples sorted by the pixel they fall in, and each pixel summed by one group of lanes.
#pragma once

#include "sources.cuh"

namespace dat {

// The samples that are sorted together: those of some queries in some units, unit by unit. A unit is one head of one image:
// b * H + h.
struct Batch {
  int64_t first_unit, units;
  int64_t first_query, queries;

  DAT_HOST_DEVICE int64_t samples_of_unit(const Geometry& g) const { return queries * g.samples(); }
  DAT_HOST_DEVICE int64_t size(const Geometry& g) const { return units * samples_of_unit(g); }
  // Returns the index of a unit's first sample among all; the stride between queries is H * L * P.
  DAT_HOST_DEVICE int64_t origin(const Geometry& g, int64_t unit) const {
    return ((unit / g.H * g.Q + first_query) * g.H + unit % g.H) * g.samples();
  }
  DAT_HOST_DEVICE int64_t index(const Geometry& g, int64_t origin, int64_t i) const {
    return origin + i / g.samples() * g.H * g.samples() + i % g.samples();
  }
};

constexpr int kSortThreads = 256;

// Values that the backward kernels saved for every sample; weights are null where all are one.
template <typename Real>
struct KeptInput {
  Pointer<const Real> pixels, weights;
};

template <typename Real>
__device__ __forceinline__ Sample<Real> kept_sample(const Geometry& g, const KeptInput<Real>& kept, int64_t k, int level) {
  Sample<Real> s;
  s.level = g.levels[level];
  s.pixel_x = get<Real>(kept.pixels + 2 * k);
  s.pixel_y = get<Real>(kept.pixels + 2 * k + 1);
  s.weight = kept.weights ? get<Real>(kept.weights + k) : Real(1);
  s.interpolate(1, 1);
  return s;
}

// The pixel of every sample's low corner, counted from the first unit of the batch; the number of all pixels where a sample
// reads nothing.
template <typename Real>
__global__ __launch_bounds__(kSortThreads, 1) void keys_kernel(
    const __grid_constant__ Geometry g, const __grid_constant__ Batch batch, const __grid_constant__ KeptInput<Real> kept,
    Pointer<int> keys) {
  const int64_t step = int64_t(gridDim.x) * kSortThreads, per_unit = batch.samples_of_unit(g);
  for (int64_t i = int64_t(blockIdx.x) * kSortThreads + threadIdx.x; i < batch.size(g); i += step) {
    const int64_t unit = i / per_unit, place = i % per_unit;
    const int64_t k = batch.index(g, batch.origin(g, batch.first_unit + unit), place);
    const Sample<Real> s = kept_sample(g, kept, k, g.level_of(static_cast<int>(place % g.samples())));
    *view<int>(keys + i) = static_cast<int>(s.inside ? unit * g.S + s.pixel() : batch.units * g.S);
  }
}

// The first of `count` sorted keys that is not less than `key`.
__device__ __forceinline__ int64_t lower_bound(Pointer<const int> keys, int64_t count, int64_t key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (get<int>(keys + middle) < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Real>
__device__ __forceinline__ Real weight_of(const Axis<Real, int>& axis, int pixel) {
  return (axis.low == pixel ? axis.low_weight : Real(0)) + (axis.high == pixel ? axis.high_weight : Real(0));
}

struct Pixel {
  int level, x, y;
};

__device__ __forceinline__ Pixel pixel_of(const Geometry& g, int row) {
  Pixel pixel = {0, 0, 0};
  while (pixel.level + 1 < g.L && row >= g.levels[pixel.level + 1].start) pixel.level++;
  // An empty level starts where the next one does, and is passed over.
  const Level level = g.levels[pixel.level];
  pixel.y = (row - level.start) / level.width, pixel.x = (row - level.start) % level.width;
  return pixel;
}

// Samples of one range of the sorted keys, added to the channels of one lane.
template <int kWidth, typename T, typename Real>
__device__ __forceinline__ void add_range(
    const Geometry& g, const Batch& batch, const KeptInput<Real>& kept, int64_t unit, const Pixel& pixel,
    bool row_per_sample, Pointer<const int64_t> order, int64_t begin, int64_t end, Pointer<const T> grad,
    Real (&sums)[kWidth]) {
  const int64_t origin = batch.origin(g, batch.first_unit + unit), skipped = unit * batch.samples_of_unit(g);
  for (int64_t i = begin; i < end; i++) {
    const int64_t k = batch.index(g, origin, get<int64_t>(order + i) - skipped);
    const Sample<Real> s = kept_sample(g, kept, k, pixel.level);
    const Real weight = s.weight * weight_of(s.x, pixel.x) * weight_of(s.y, pixel.y);
    if (weight == Real(0)) continue;
    Real x[kWidth];
    widen(get_pack<kWidth, T>(grad + (row_per_sample ? k : k / g.samples()) * g.D), x);
#pragma unroll
    for (int j = 0; j < kWidth; j++) sums[j] += weight * x[j];
  }
}

// `lanes` threads for every pixel of every unit in the batch.
template <int kWidth, typename T, typename Real>
__global__ __launch_bounds__(kSortThreads, 1) void sum_pixels_kernel(
    const __grid_constant__ Geometry g, const __grid_constant__ Batch batch, const __grid_constant__ KeptInput<Real> kept,
    bool row_per_sample, int lanes, Pointer<const int> keys, Pointer<const int64_t> order, Pointer<const T> grad,
    Pointer<Real> grad_value) {
  const int64_t groups = kSortThreads / lanes, count = batch.size(g);
  const int lane = threadIdx.x % lanes;
  for (int64_t i = blockIdx.x * groups + threadIdx.x / lanes; i < batch.units * g.S; i += gridDim.x * groups) {
    const int64_t unit = i / g.S, row = i % g.S;
    const Pixel pixel = pixel_of(g, static_cast<int>(row));
    const int width = g.levels[pixel.level].width;
    // Samples reach a pixel from their low corner's: the pixel itself, the one to its left, and those above the two.
    const int64_t left = pixel.x > 0 ? i - 1 : i;
    const int64_t begin = lower_bound(keys, count, left), end = lower_bound(keys, count, i + 1);
    const int64_t above_begin = pixel.y > 0 ? lower_bound(keys, count, left - width) : 0;
    const int64_t above_end = pixel.y > 0 ? lower_bound(keys, count, i - width + 1) : 0;
    const int64_t u = batch.first_unit + unit;
    const int64_t to = ((u / g.H * g.S + row) * g.H + u % g.H) * g.D;
    for (int64_t d = lane * kWidth; d < g.D; d += lanes * kWidth) {
      Real sums[kWidth] = {};
      add_range<kWidth>(g, batch, kept, unit, pixel, row_per_sample, order, above_begin, above_end, grad + d, sums);
      add_range<kWidth>(g, batch, kept, unit, pixel, row_per_sample, order, begin, end, grad + d, sums);
#pragma unroll
      for (int j = 0; j < kWidth; j++) *view<Real>(grad_value + to + d + j) += sums[j];
    }
  }
}

}  // namespace dat
