// Gradients of a layer's weight and bias, which are sums over all pixels of a map: blocks sum parts of them, in float32 and
// in a fixed order, and one more kernel sums the parts.
#pragma once

#include "launch.cuh"

namespace dat {

// Channels that a thread reads at once.
constexpr int kPack = 4;
constexpr int kGradThreads = 256;

template <int kCount>
using GradStage = SharedArray<SharedArray<Pack<float, kPack>, kGradThreads / 2>, kCount>;

// Adds to the sums of the first `lanes` threads those of all others, thread by thread in the same order every time.
template <int kCount>
__device__ __forceinline__ void sum_groups(int lanes, float (&sums)[kCount][kPack]) {
  auto& stage = shared_memory<GradStage<kCount>>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = kGradThreads / 2; half >= lanes; half /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; k++)
      if (thread >= half && thread < 2 * half) memcpy(&stage[k][thread - half], sums[k], sizeof(sums[k]));
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; k++)
#pragma unroll
      for (int j = 0; j < kPack; j++)
        if (thread < half) sums[k][j] += stage[k][thread].x[j];
    __syncthreads();
  }
}

// Lanes of sum_parts_kernel: 64 bytes of every part.
constexpr int kSumLanes = 4;

// The gradients of weight [C, taps] and bias [C] from their parts [count, taps + 1, C].
static __global__ __launch_bounds__(kGradThreads, 1) void sum_parts_kernel(
    int C, int taps, int count, Pointer<const float> parts, Pointer<float> grad_weight, Pointer<float> grad_bias) {
  const int64_t size = int64_t(taps + 1) * C;
  const int64_t place = (int64_t(blockIdx.x) * kSumLanes + threadIdx.x % kSumLanes) * kPack;
  float sums[1][kPack] = {};
  for (int p = static_cast<int>(threadIdx.x) / kSumLanes; p < count && place < size; p += kGradThreads / kSumLanes) {
    float x[kPack];
    widen(get_pack<kPack, float>(parts + p * size + place), x);
#pragma unroll
    for (int j = 0; j < kPack; j++) sums[0][j] += x[j];
  }
  sum_groups(kSumLanes, sums);
  if (threadIdx.x >= kSumLanes || place >= size) return;
  const int64_t tap = place / C, channel = place % C;
  for (int j = 0; j < kPack; j++) {
    const int64_t c = channel + j;
    put<float>(tap < taps ? grad_weight + c * taps + tap : grad_bias + c, sums[0][j]);
  }
}

inline cudaError_t run_sum_parts(
    int C, int taps, int64_t count, Pointer<float> parts, Pointer<float> grad_weight, Pointer<float> grad_bias,
    cudaStream_t stream) {
  const int64_t blocks = (int64_t(taps + 1) * C / kPack + kSumLanes - 1) / kSumLanes;
  return launch(
      sum_parts_kernel, blocks, 1, 1, kGradThreads, stream, C, taps, static_cast<int>(count), Pointer<const float>(parts),
      grad_weight, grad_bias);
}

}  // namespace dat
