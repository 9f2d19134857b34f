// Forward of both ops: rows of channels gathered around every sample.
#pragma once

#include "sources.cuh"

namespace dat {

// Zeros that out-of-bounds samples load.
constexpr int kZeroBytes = 512;
static __device__ const uint4 kZeros[kZeroBytes / sizeof(uint4)] = {};

template <typename Rows>
struct ForwardStage {
  using Step = Steps<Pointer<const typename Rows::T>, typename Rows::Delta>;
  static_assert(Rows::kChannels * sizeof(typename Rows::T) <= kZeroBytes);

  // One slot more than needed keeps the groups of a warp in different banks.
  SharedArray<SharedArray<Corners<typename Rows::Real>, Rows::kSlots + 1>, Rows::kGroups> corners;
  SharedArray<SharedArray<Step, Rows::kSlots + 1>, Rows::kGroups> steps;
};

// The group's lanes prepare samples first, first + 1, ...; slots without a sample get weight zero.
template <typename Rows, typename Source>
__device__ __forceinline__ void prepare(
    const Geometry& g, const Source& source, int first, Pointer<const typename Rows::T> plane, int group, int lane,
    ForwardStage<Rows>& stage) {
  using T = typename Rows::T;
  using Real = typename Rows::Real;
  using Delta = typename Rows::Delta;
  const Delta stride = static_cast<Delta>(g.stride);
#pragma unroll
  for (int slot = lane; slot < Rows::kSlots; slot += Rows::kLanes) {
    Corners<Real> corners = {};
    typename ForwardStage<Rows>::Step step = {view<const T>(Pointer<const uint4>(kZeros)), 0, 0};
    if (source.has(first + slot)) {
      const Sample<Real> s = source.sample(first + slot);
      if (s.inside) {
        corners = s.corners();
        step.origin = plane + static_cast<int64_t>(s.pixel()) * stride;
        step.right = (s.x.high - s.x.low) * stride;
        step.down = (s.y.high - s.y.low) * s.level.width * stride;
      }
    }
    stage.corners[group][slot] = corners;
    stage.steps[group][slot] = step;
  }
}

// Adds one sample to the sums of a lane, which stops at channel `end` of a slice.
template <typename Rows>
__device__ __forceinline__ void gather(
    const Corners<typename Rows::Real>& corners, const typename ForwardStage<Rows>::Step& step, int64_t end, int lane,
    typename Rows::Real (&sums)[Rows::kVectors][Rows::kWidth]) {
  using T = typename Rows::T;
#pragma unroll
  for (int v = 0; v < Rows::kVectors; v++) {
    const int channel = Rows::channel(v, lane);
    if (Rows::kMasked && channel >= end) continue;
    const Pointer<const T> low = step.origin + channel, high = low + step.down;
    const Pointer<const T> rows[4] = {low, low + step.right, high, high + step.right};
#pragma unroll
    for (int c = 0; c < 4; c++) {
      typename Rows::Real x[Rows::kWidth];
      widen(get_pack<Rows::kWidth, T>(rows[c]), x);
#pragma unroll
      for (int j = 0; j < Rows::kWidth; j++) sums[v][j] += corners.x[c] * x[j];
    }
  }
}

template <typename Rows>
__device__ __forceinline__ void put_row(
    Pointer<typename Rows::T> row, int64_t end, int lane, const typename Rows::Real (&sums)[Rows::kVectors][Rows::kWidth]) {
#pragma unroll
  for (int v = 0; v < Rows::kVectors; v++) {
    const int channel = Rows::channel(v, lane);
    if (!Rows::kMasked || channel < end) put_pack<Rows::kWidth, typename Rows::T>(row + channel, sums[v]);
  }
}

// One slice of the rows that a source makes.
template <typename Rows, typename Source>
__device__ __forceinline__ void forward_slice(
    const Geometry& g, const Source& source, Pointer<const typename Rows::T> plane, Pointer<typename Rows::T> out,
    int64_t slice, int group, int lane, ForwardStage<Rows>& stage) {
  const int64_t end = g.D - slice;
  typename Rows::Real sums[Rows::kVectors][Rows::kWidth] = {};
  for (int first = 0; first < source.count(); first += Rows::kSlots) {
    prepare(g, source, first, plane + slice, group, lane, stage);
    __syncwarp();
    const int count = source.count() - first < Rows::kSlots ? source.count() - first : Rows::kSlots;
    for (int quad = 0; quad < count; quad += 4) {
      // Enough loads under way together, and no more than there are registers for.
#pragma unroll(Rows::kVectors == 1 ? 4 : 1)
      for (int k = quad; k < quad + 4; k++) {
        gather<Rows>(stage.corners[group][k], stage.steps[group][k], end, lane, sums);
        if constexpr (Source::kRowPerSample) {
          const int64_t row = source.row(k);
          if (row >= 0) put_row<Rows>(out + row * g.D + slice, end, lane, sums);
#pragma unroll
          for (int v = 0; v < Rows::kVectors; v++)
#pragma unroll
            for (int j = 0; j < Rows::kWidth; j++) sums[v][j] = 0;
        }
      }
    }
    __syncwarp();
  }
  if constexpr (!Source::kRowPerSample) {
    if (source.row(0) >= 0) put_row<Rows>(out + source.row(0) * g.D + slice, end, lane, sums);
  }
}

template <typename Rows, template <typename> typename Source_>
__global__ __launch_bounds__(Rows::kThreads, Rows::kBlocks) void forward_kernel(
    const __grid_constant__ Geometry g, const __grid_constant__ typename Source_<Rows>::Input in,
    Pointer<const typename Rows::T> value, Pointer<typename Rows::T> out) {
  using Source = Source_<Rows>;
  auto& stage = shared_memory<ForwardStage<Rows>>();
  const int group = threadIdx.x / Rows::kLanes, lane = threadIdx.x % Rows::kLanes;
  const int groups = blockDim.x / Rows::kLanes;
  for (int64_t b = blockIdx.z; b < g.B; b += gridDim.z) {
    for (int64_t h = blockIdx.y; h < g.H; h += gridDim.y) {
      const Pointer<const typename Rows::T> plane = value + (b * g.S * g.H + h) * g.D;
      for (int slot = group; slot < g.block_queries; slot += groups) {
        const int64_t query = query_of(g, Source::queries(g), blockIdx.x, slot);
        if (!__any_sync(kWarp, query >= 0)) continue;
        const Source source(g, in, b, h, query, lane);
        for (int64_t slice = 0; slice < (Rows::kMasked ? g.D : 1); slice += Rows::kChannels)
          forward_slice<Rows>(g, source, plane, out, slice, group, lane, stage);
      }
    }
  }
}

}  // namespace dat
