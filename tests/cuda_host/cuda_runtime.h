// The part of CUDA that dat's kernels use, on the host: a block's threads are fibres that meet in warp operations and
// barriers.
//
// Stands in for CUDA's own header when tests compile the kernels with a plain C++ compiler. A lane runs until it meets the
// others of its warp, or block. The kernels' mistakes are errors: lanes that meet in different places or have left, accesses
// outside a buffer or not aligned; shared memory starts out as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#include "checked.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class Meeting { kSyncWarp, kSyncBlock, kAny, kExchange };

// What a lane brings to a meeting, and what it takes away from it.
struct Visit {
  Meeting meeting;
  std::source_location place;
  uint64_t bits;
  int lane_mask;
};

// Waits for the other lanes of the warp or, in kSyncBlock, of the block; returns what the meeting gives this one.
uint64_t meet(const Visit& visit);

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

}  // namespace emulator

inline void check_full(unsigned mask) {
  if (mask != 0xffffffffu) checked::fail("a warp operation without all of its lanes");
}

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location place = std::source_location::current()) {
  check_full(mask);
  emulator::meet({emulator::Meeting::kSyncWarp, place, 0, 0});
}

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  emulator::meet({emulator::Meeting::kSyncBlock, place, 0, 0});
}

inline int __any_sync(unsigned mask, int predicate, std::source_location place = std::source_location::current()) {
  check_full(mask);
  return static_cast<int>(emulator::meet({emulator::Meeting::kAny, place, predicate != 0, 0}));
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T x, int lane_mask, int width = 32, std::source_location place = std::source_location::current()) {
  check_full(mask);
  if (width != 32 || lane_mask < 1 || lane_mask > 31) checked::fail("a shuffle beyond the warp");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = emulator::meet({emulator::Meeting::kExchange, place, bits, lane_mask});
  memcpy(&x, &bits, sizeof(T));
  return x;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <typename T>
T __ldg(const checked::View<const T>& from) {
  return *from;
}

// Fibres run one at a time, so that a plain sum is atomic.
template <typename T>
T atomicAdd(const checked::View<T>& to, T x) {
  const T before = *to;
  *to = before + x;
  return before;
}

inline float4 atomicAdd(const checked::View<float4>& to, float4 x) {
  const float4 before = *to;
  *to = {before.x + x.x, before.y + x.y, before.z + x.z, before.w + x.w};
  return before;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  emulator::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}
