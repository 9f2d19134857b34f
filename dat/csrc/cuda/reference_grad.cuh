// Gradients of ms_deform_attn by reference points and boxes: sums over heads and points, in a fixed order.
#pragma once

#include "sources.cuh"

namespace dat {

constexpr int kReferenceThreads = 128;

// A warp for each query and level.
template <typename T, typename Real>
__global__ __launch_bounds__(kReferenceThreads, 1) void reference_grad_kernel(
    const __grid_constant__ Geometry g, const __grid_constant__ AttentionInput<Real> in, Pointer<const Real> grad_pixels,
    Pointer<Real> grad_reference) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (kReferenceThreads / 32);
  for (int64_t i = (int64_t(blockIdx.x) * kReferenceThreads + threadIdx.x) / 32; i < g.B * g.Q * g.L; i += step) {
    const int64_t query = i / g.L;
    const int level = static_cast<int>(i % g.L);
    Real center[2] = {}, box[2] = {};
    for (int64_t j = lane; j < g.H * g.P; j += 32) {
      const int64_t k = ((query * g.H + j / g.P) * g.L + level) * g.P + j % g.P;
#pragma unroll
      for (int axis = 0; axis < 2; axis++) {
        const Real grad_pixel = get<Real>(grad_pixels + 2 * k + axis);
        center[axis] += grad_pixel;
        // A sample outside has no gradient, however large its offset.
        if (in.boxes && grad_pixel != Real(0)) {
          box[axis] += grad_pixel * get_either<T, Real>(in.offsets, in.narrow, 2 * k + axis);
        }
      }
    }
    const int components = in.boxes ? 4 : 2;
#pragma unroll
    for (int axis = 0; axis < 2; axis++) {
      const Real size = static_cast<Real>(axis ? g.levels[level].height : g.levels[level].width);
      const Real grad_center = group_sum<32>(center[axis]) * size, grad_box = group_sum<32>(box[axis]) * size * in.box_share;
      if (lane == 0) put<Real>(grad_reference + i * components + axis, grad_center);
      if (lane == 0 && in.boxes) put<Real>(grad_reference + i * components + 2 + axis, grad_box);
    }
  }
}

}  // namespace dat
