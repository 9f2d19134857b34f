// Sizes of a call, and the assignment of lanes to channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../bilinear.h"
#include "memory.cuh"

namespace dat {

constexpr int kMaxLevels = 64;
constexpr int kTileWidth = 8;

// Passed by value to every kernel.
struct Geometry {
  Level levels[kMaxLevels];
  int64_t B, S, H, D, Q;
  // Elements from pixel to pixel: H * D.
  int64_t stride;
  int L, P;
  // Divides by P where samples are counted below 2**31 / P, otherwise 0: 2**31 / P, rounded up.
  unsigned points_inverse;
  bool align_corners;
  // If the queries are the pixels of the levels, a block takes a tile of them, whose samples lie close together and hit the
  // L1 cache; otherwise it takes consecutive queries.
  bool tiled;
  int tile_height;
  int first_tile[kMaxLevels];
  int block_queries;

  DAT_HOST_DEVICE int samples() const { return L * P; }
  // The level that sample `i` of a head is in. The compiler's division takes some twenty instructions.
  DAT_HOST_DEVICE int level_of(int i) const {
    return points_inverse ? static_cast<int>(static_cast<uint64_t>(i) * points_inverse >> 31) : i / P;
  }
};

// Computes the fields that depend on the sizes. At most kMaxLevels levels, and fewer than 2**31 samples of a head.
inline Geometry make_geometry(
    int64_t B, int64_t H, int64_t D, int64_t Q, int64_t P, const std::vector<Level>& levels, bool align_corners) {
  Geometry g = {};
  std::copy(levels.begin(), levels.end(), g.levels);
  g.B = B, g.H = H, g.D = D, g.Q = Q, g.L = static_cast<int>(levels.size()), g.P = static_cast<int>(P);
  for (const Level& level : levels) g.S += int64_t(level.height) * level.width;
  g.stride = H * D;
  constexpr int64_t kRange = int64_t(1) << 31;
  if (P > 0 && g.samples() < kRange / P) g.points_inverse = static_cast<unsigned>((kRange + P - 1) / P);
  g.align_corners = align_corners;
  return g;
}

DAT_HOST_DEVICE unsigned tiles_across(const Level& level) {
  return (static_cast<unsigned>(level.width) + kTileWidth - 1) / kTileWidth;
}

// Query `slot` of a block out of `count`, -1 where there is none.
__device__ __forceinline__ int64_t query_of(const Geometry& g, int64_t count, unsigned block, int slot) {
  if (!g.tiled) {
    const int64_t query = int64_t(block) * g.block_queries + slot;
    return query < count ? query : -1;
  }
  int l = 0;
  while (l + 1 < g.L && block >= static_cast<unsigned>(g.first_tile[l + 1])) l++;
  const Level level = g.levels[l];
  const unsigned across = tiles_across(level), tile = block - g.first_tile[l];
  const unsigned y = tile / across * g.tile_height + slot / kTileWidth;
  const unsigned x = tile % across * kTileWidth + slot % kTileWidth;
  const bool inside = y < static_cast<unsigned>(level.height) && x < static_cast<unsigned>(level.width);
  return inside ? level.start + static_cast<int64_t>(y) * level.width + x : -1;
}

// How a row of channels is split among a group of lanes: every lane takes `kVectors` packs of `kWidth`. A masked layout fits
// any D: lanes skip channels past the end and loop over the slices of the row.
template <typename T_, int kLanes_, int kVectors_, int kWidth_, bool kMasked_>
struct Rows {
  using T = T_;
  using Real = typename RealOf<T>::type;
  // Distances between the rows of a sample, in elements.
  using Delta = std::conditional_t<kMasked_, int64_t, int>;
  static constexpr int kLanes = kLanes_, kVectors = kVectors_, kWidth = kWidth_;
  static constexpr bool kMasked = kMasked_;
  static constexpr int kChannels = kLanes * kVectors * kWidth;
  // Samples that a group prepares together in shared memory, a multiple of four for the loop over them.
  static constexpr int kSlots = kLanes < 4 ? 4 : kLanes;
  static constexpr int kThreads = kLanes < 4 ? 64 * kLanes : 256;
  static constexpr int kGroups = kThreads / kLanes;
  // Resident blocks of a multiprocessor, limited by the registers of their threads. Without this bound the compiler spills
  // registers to fit more blocks.
  static constexpr int kRegisters = kVectors > 1 ? 128 : kLanes < 4 ? 96 : 80;
  static constexpr int kBlocks = 65536 / (kThreads * kRegisters);

  // The first channel of a lane's pack `v`, from the start of the slice.
  static __device__ __forceinline__ int channel(int v, int lane) { return (v * kLanes + lane) * kWidth; }
};

template <typename Real>
struct alignas(16) Corners {
  Real x[4];
};

// Addresses of a sample's four corners: the low row of the low column, and the steps to the high ones.
template <typename Origin, typename Delta>
struct alignas(16) Steps {
  Origin origin;
  Delta right, down;
};

// A sample in its level. `inside` is false for one that reads nothing, whatever its weight.
template <typename Real>
struct Sample {
  Axis<Real, int> x, y;
  Real pixel_x, pixel_y;
  Real weight;
  Level level;
  bool inside;

  __device__ __forceinline__ void interpolate(Real factor_x, Real factor_y) {
    x = interpolate_pixel<Scalar<Real>>(pixel_x, factor_x, level.width);
    y = interpolate_pixel<Scalar<Real>>(pixel_y, factor_y, level.height);
    inside = x.inside && y.inside;
  }
  __device__ __forceinline__ int pixel() const { return level.start + y.low * level.width + x.low; }
  __device__ __forceinline__ Corners<Real> corners() const {
    const Real low = weight * y.low_weight, high = weight * y.high_weight;
    return {{low * x.low_weight, low * x.high_weight, high * x.low_weight, high * x.high_weight}};
  }
};

}  // namespace dat
