// Kernels with a mistake each, that the emulator has to find.
#include <cstdint>

#include "calls.h"

namespace {

using Numbers = checked::Pointer<float>;

void past_the_end(Numbers numbers) { *checked::view<float>(numbers + threadIdx.x + 1) = 0; }

void before_the_start(Numbers numbers) { *checked::view<float>(numbers + (static_cast<int64_t>(threadIdx.x) - 1)) = 0; }

void half_past_the_end(Numbers numbers) { (*checked::view<float4>(numbers + 32)).w = 0; }

void not_aligned(Numbers numbers) { (*checked::view<float4>(numbers + 1)).x = 0; }

void shared_past_the_end(Numbers) {
  auto& numbers = checked::shared_memory<checked::SharedArray<float, 32>>();
  numbers[threadIdx.x + 1] = 0;
}

void lanes_part(Numbers numbers) {
  if (threadIdx.x % 2) {
    *checked::view<float>(numbers) = __shfl_xor_sync(~0u, 1.0f, 1);
  } else {
    *checked::view<float>(numbers) = __shfl_xor_sync(~0u, 1.0f, 1);
  }
}

void lane_leaves(Numbers) {
  if (threadIdx.x) __syncwarp();
}

void warp_leaves(Numbers) {
  if (threadIdx.x >= 32) __syncthreads();
}

void warps_part(Numbers) {
  if (threadIdx.x >= 32) __syncthreads();
  if (threadIdx.x < 32) __syncthreads();
}

// Lane 0 reads what lane 31 writes, and the other way round.
void trade(Numbers numbers, bool wait) {
  auto& shared = checked::shared_memory<checked::SharedArray<float, 64>>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (wait) __syncwarp();
  *checked::view<float>(numbers + threadIdx.x) = shared[threadIdx.x ^ 31];
}

void trade_together(Numbers numbers) { trade(numbers, true); }
void trade_alone(Numbers numbers) { trade(numbers, false); }

}  // namespace

// Runs kernel `which` on 64 threads and as many numbers; null, or what went wrong.
extern "C" const char* run_mistake(int which, float* numbers) {
  void (*const kernels[])(Numbers) = {past_the_end,        before_the_start, half_past_the_end, not_aligned,
                                      shared_past_the_end, lanes_part,       lane_leaves,       warp_leaves,
                                      warps_part,          trade_alone,      trade_together};
  cudaLaunchConfig_t config;
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  return error_of([&] { cudaLaunchKernelEx(&config, kernels[which], Numbers(numbers, which == 2 ? 35 : 64)); });
}
