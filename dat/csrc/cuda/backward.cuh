// Backward of both ops: gradients by samples without atomics, gradients by value added atomically or left to
// deterministic.cuh.
#pragma once

#include "sources.cuh"

namespace dat {

template <typename Rows>
struct BackwardStage {
  using Real = typename Rows::Real;
  // The origin is an offset in `value` and in its gradient, -1 for a sample that reads nothing.
  using Step = Steps<int64_t, typename Rows::Delta>;

  SharedArray<SharedArray<Corners<Real>, Rows::kSlots + 1>, Rows::kGroups> corners;
  SharedArray<SharedArray<Step, Rows::kSlots + 1>, Rows::kGroups> steps;
  // Inner products of the output's gradient with the four corner rows.
  SharedArray<SharedArray<Corners<Real>, Rows::kSlots + 1>, Rows::kGroups> dots;
};

template <typename Rows, typename Source>
__device__ __forceinline__ void prepare(
    const Geometry& g, const Source& source, int first, int64_t plane, int group, int lane, BackwardStage<Rows>& stage) {
  using Delta = typename Rows::Delta;
  const Delta stride = static_cast<Delta>(g.stride);
#pragma unroll
  for (int slot = lane; slot < Rows::kSlots; slot += Rows::kLanes) {
    Corners<typename Rows::Real> corners = {};
    typename BackwardStage<Rows>::Step step = {-1, 0, 0};
    if (source.has(first + slot)) {
      const Sample<typename Rows::Real> s = source.sample(first + slot);
      if (s.inside) {
        corners = s.corners();
        step.origin = plane + static_cast<int64_t>(s.pixel()) * stride;
        step.right = (s.x.high - s.x.low) * stride;
        step.down = (s.y.high - s.y.low) * s.level.width * stride;
      }
    }
    stage.corners[group][slot] = corners;
    stage.steps[group][slot] = step;
    if (Rows::kMasked) stage.dots[group][slot] = {};
  }
}

// A lane's part of the inner products of one sample, and of its gradient by value where `grad_value` is not null.
template <typename Rows>
__device__ __forceinline__ void scatter(
    const Corners<typename Rows::Real>& corners, const typename BackwardStage<Rows>::Step& step, int64_t slice, int64_t end,
    int lane, Pointer<const typename Rows::T> value, Pointer<typename Rows::Real> grad_value,
    const typename Rows::Real (&grad)[Rows::kVectors][Rows::kWidth], typename Rows::Real (&dot)[4]) {
  using T = typename Rows::T;
  using Real = typename Rows::Real;
#pragma unroll
  for (int v = 0; v < Rows::kVectors; v++) {
    const int channel = Rows::channel(v, lane);
    if (Rows::kMasked && channel >= end) continue;
    const int64_t low = step.origin + slice + channel, high = low + step.down;
    const int64_t rows[4] = {low, low + step.right, high, high + step.right};
#pragma unroll
    for (int c = 0; c < 4; c++) {
      Real x[Rows::kWidth];
      widen(get_pack<Rows::kWidth, T>(value + rows[c]), x);
#pragma unroll
      for (int j = 0; j < Rows::kWidth; j++) dot[c] += grad[v][j] * x[j];
    }
    if (!grad_value) continue;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      if (corners.x[c] != Real(0)) atomic_add<Rows::kWidth, Real>(grad_value + rows[c], corners.x[c], grad[v]);
    }
  }
}

// Sums the inner products over the lanes of a group and puts them, or with kAdd adds them, to `sums`. Lanes first exchange
// corners, so that each continues with fewer of them: with four lanes or more lane 2 * i + j ends up with the corner in row
// i and column j.
template <int kLanes, bool kAdd, typename Real>
__device__ __forceinline__ void put_dots(const Real (&dot)[4], int lane, Corners<Real>& sums) {
  const auto put_sum = [&](int corner, Real x) { sums.x[corner] = kAdd ? sums.x[corner] + x : x; };
  if constexpr (kLanes == 1) {
#pragma unroll
    for (int c = 0; c < 4; c++) put_sum(c, dot[c]);
  } else {
    const bool right = lane & 1, low = lane & 2;
    Real column[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Real given = right ? dot[2 * i] : dot[2 * i + 1], kept = right ? dot[2 * i + 1] : dot[2 * i];
      column[i] = kept + __shfl_xor_sync(kWarp, given, 1);
    }
    if constexpr (kLanes == 2) {
      put_sum(right, column[0]);
      put_sum(2 + right, column[1]);
    } else {
      Real corner = (low ? column[1] : column[0]) + __shfl_xor_sync(kWarp, low ? column[0] : column[1], 2);
#pragma unroll
      for (int step = 4; step < kLanes; step *= 2) corner += __shfl_xor_sync(kWarp, corner, step);
      if (lane < 4) put_sum(lane, corner);
    }
  }
}

template <typename Rows>
__device__ __forceinline__ void get_row(
    Pointer<const typename Rows::T> row, int64_t end, int lane, typename Rows::Real (&grad)[Rows::kVectors][Rows::kWidth]) {
#pragma unroll
  for (int v = 0; v < Rows::kVectors; v++) {
    const int channel = Rows::channel(v, lane);
    if (Rows::kMasked && channel >= end) continue;
    widen(get_pack<Rows::kWidth, typename Rows::T>(row + channel), grad[v]);
  }
}

// One slice of channels of the samples that are prepared in shared memory.
template <typename Rows, typename Source>
__device__ __forceinline__ void backward_slice(
    const Geometry& g, const Source& source, int count, int64_t slice, Pointer<const typename Rows::T> grad,
    Pointer<const typename Rows::T> value, Pointer<typename Rows::Real> grad_value, int group, int lane,
    BackwardStage<Rows>& stage) {
  using Real = typename Rows::Real;
  const int64_t end = g.D - slice;
  Real row_grad[Rows::kVectors][Rows::kWidth] = {};
  if (!Source::kRowPerSample && source.row(0) >= 0) get_row<Rows>(grad + source.row(0) * g.D + slice, end, lane, row_grad);
  for (int k = 0; k < count; k++) {
    const Corners<Real> corners = stage.corners[group][k];
    const auto step = stage.steps[group][k];
    Real dot[4] = {};
    if (step.origin >= 0) {
      if constexpr (Source::kRowPerSample) get_row<Rows>(grad + source.row(k) * g.D + slice, end, lane, row_grad);
      scatter<Rows>(corners, step, slice, end, lane, value, grad_value, row_grad, dot);
    }
    put_dots<Rows::kLanes, Rows::kMasked>(dot, lane, stage.dots[group][k]);
  }
}

// Samples first, first + 1, ... of a source, as many as there are slots.
template <typename Rows, typename Source>
__device__ __forceinline__ void backward_samples(
    const Geometry& g, Source& source, int first, int64_t plane, const typename Source::Grads& grads,
    Pointer<const typename Rows::T> grad, Pointer<const typename Rows::T> value, Pointer<typename Rows::Real> grad_value,
    int group, int lane, BackwardStage<Rows>& stage) {
  using Real = typename Rows::Real;
  const int count = source.count() - first < Rows::kSlots ? source.count() - first : Rows::kSlots;
  prepare(g, source, first, plane, group, lane, stage);
  __syncwarp();
  // An empty row has a slice too, so that its samples get gradients of zero.
  for (int64_t slice = 0; slice == 0 || (Rows::kMasked && slice < g.D); slice += Rows::kChannels)
    backward_slice<Rows>(g, source, count, slice, grad, value, grad_value, group, lane, stage);
  __syncwarp();
#pragma unroll
  for (int slot = lane; slot < Rows::kSlots; slot += Rows::kLanes) {
    if (!source.has(first + slot)) continue;
    const Corners<Real> dots = stage.dots[group][slot];
    source.put_grad(grads, first + slot, dots.x);
  }
  // No synchronisation: a lane next prepares only slots that it alone has read since the last one.
}

template <typename Rows, template <typename> typename Source_>
__global__ __launch_bounds__(Rows::kThreads, Rows::kBlocks) void backward_kernel(
    const __grid_constant__ Geometry g, const __grid_constant__ typename Source_<Rows>::Input in,
    const __grid_constant__ typename Source_<Rows>::Grads grads, Pointer<const typename Rows::T> grad,
    Pointer<const typename Rows::T> value, Pointer<typename Rows::Real> grad_value) {
  using Source = Source_<Rows>;
  auto& stage = shared_memory<BackwardStage<Rows>>();
  const int group = threadIdx.x / Rows::kLanes, lane = threadIdx.x % Rows::kLanes;
  const int groups = blockDim.x / Rows::kLanes;
  for (int64_t b = blockIdx.z; b < g.B; b += gridDim.z) {
    for (int64_t h = blockIdx.y; h < g.H; h += gridDim.y) {
      const int64_t plane = (b * g.S * g.H + h) * g.D;
      for (int slot = group; slot < g.block_queries; slot += groups) {
        const int64_t query = query_of(g, Source::queries(g), blockIdx.x, slot);
        if (!__any_sync(kWarp, query >= 0)) continue;
        Source source(g, in, b, h, query, lane);
        for (int first = 0; first < source.count(); first += Rows::kSlots)
          backward_samples<Rows>(g, source, first, plane, grads, grad, value, grad_value, group, lane, stage);
        source.finish(grads, lane);
      }
    }
  }
}

}  // namespace dat
