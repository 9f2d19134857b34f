// What the registration of deform_sample and its kernels for each instruction set have in common.
#pragma once

#include <cstdint>

#include "../bilinear.h"

namespace dat {

enum class ValueType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Sizes and contiguous arrays of one call; without weights it returns every sample. Locations, weights and their gradients
// are in the dtype of the sums: float64 for float64 values, else float32.
struct SampleArgs {
  ValueType type;
  int64_t B, S, H, D, Q, L, P;
  const Level* levels;
  bool align_corners, weighted;
  const void* value;
  const void* locations;
  const void* weights;
};

// Gradients; by_value is zeroed, and in the dtype of the sums.
struct SampleGrads {
  const void* out;
  void* by_value;
  void* by_locations;
  void* by_weights;
};

// The most numbers that a register holds.
constexpr int kMaxLanes = 16;

// `scratch` holds 12 numbers of 8 bytes for each of the L * P samples of a head, and for kMaxLanes more. forward does rows
// begin..end of B * Q. backward does units begin..end of B * H * (L / levels), `levels` levels of a head each: a unit owns
// its rows and channels of by_value, so that no two threads meet and the order of the sums is fixed.
struct SampleKernels {
  void (*forward)(const SampleArgs& args, void* out, void* scratch, int64_t begin, int64_t end);
  void (*backward)(const SampleArgs& args, const SampleGrads& grads, int64_t levels, int64_t begin, int64_t end);
};

const SampleKernels& baseline_kernels();
#if defined(__x86_64__)
const SampleKernels& avx2_kernels();
const SampleKernels& avx512_kernels();
#endif

}  // namespace dat
