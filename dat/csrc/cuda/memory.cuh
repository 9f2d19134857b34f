// How the kernels reach memory: pointers, vectors of channels, conversions and atomic sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dat {

// Whatever the kernels read or write goes through these four, so that tests/cuda_host can run the same source on the host
// with types that check bounds and alignment.
#ifdef DAT_CHECKED_MEMORY
using checked::Pointer;
using checked::shared_memory;
using checked::SharedArray;
using checked::view;
#else
template <typename T>
using Pointer = T*;

template <typename T, int kCount>
using SharedArray = T[kCount];

// The block's one object in shared memory.
template <typename Block>
__device__ __forceinline__ Block& shared_memory() {
  __shared__ Block block;
  return block;
}

template <typename To, typename T>
__device__ __forceinline__ To* view(T* pointer) {
  return reinterpret_cast<To*>(pointer);
}
#endif

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;

// Accumulator type for T.
template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

// torch compiles without the implicit conversions of half types.
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

template <typename T>
__device__ __forceinline__ T get(Pointer<const T> from) {
  return __ldg(view<const T>(from));
}

template <typename T>
__device__ __forceinline__ void put(Pointer<T> to, typename RealOf<T>::type x) {
  narrow(x, *view<T>(to));
}

// Neighbouring channels: 16 or 8 bytes of them, or a single one.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == kVectorBytes || kWidth * sizeof(T) == kVectorBytes / 2);
  T x[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ Pack<T, kWidth> get_pack(Pointer<const T> from) {
  using Bits = std::conditional_t<sizeof(Pack<T, kWidth>) == kVectorBytes, uint4, uint2>;
  Pack<T, kWidth> pack;
  if constexpr (kWidth == 1) {
    pack.x[0] = __ldg(view<const T>(from));
  } else {
    const Bits bits = __ldg(view<const Bits>(from));
    memcpy(&pack, &bits, sizeof(bits));
  }
  return pack;
}

template <typename T, int kWidth>
__device__ __forceinline__ void widen(const Pack<T, kWidth>& pack, typename RealOf<T>::type (&x)[kWidth]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kWidth % 2 == 0) {
    // Two to a word, and each the upper half of a float: one instruction for each, where conversions take three for two.
    uint32_t words[kWidth / 2];
    memcpy(words, &pack, sizeof(words));
#pragma unroll
    for (int j = 0; j < kWidth; j++) {
      const uint32_t bits = j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16;
      memcpy(&x[j], &bits, sizeof(bits));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; j++) x[j] = widen(pack.x[j]);
  }
}

template <int kWidth, typename T, typename Real>
__device__ __forceinline__ void put_pack(Pointer<T> to, const Real (&x)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int j = 0; j < kWidth; j++) narrow(x[j], pack.x[j]);
  *view<Pack<T, kWidth>>(to) = pack;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kVectorAtomics = true;
#else
constexpr bool kVectorAtomics = false;
#endif

// Adds `factor` times `x` to neighbouring sums, four floats at a time where the device can.
template <int kWidth, typename Real>
__device__ __forceinline__ void atomic_add(Pointer<Real> to, Real factor, const Real (&x)[kWidth]) {
  if constexpr (kVectorAtomics && sizeof(Real) == sizeof(float) && kWidth % 4 == 0) {
#pragma unroll
    for (int j = 0; j < kWidth; j += 4) {
      const float4 term = make_float4(factor * x[j], factor * x[j + 1], factor * x[j + 2], factor * x[j + 3]);
      atomicAdd(view<float4>(to + j), term);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; j++) atomicAdd(view<Real>(to + j), factor * x[j]);
  }
}

}  // namespace dat
