// Arguments that the CPU registrations of the sampling ops pass to their kernels for each instruction set.
#pragma once

#include <cstdint>

#include "../bilinear.h"

namespace dat {

enum class ValueType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Sizes and contiguous arrays of one call. `Real` is the dtype of the sums: float64 for float64 values, else float32.
struct SampleArgs {
  ValueType type;
  int64_t B, S, H, D, Q, L, P;
  const Level* levels;
  bool align_corners;
  // Without weights every sample is returned, not their weighted sum.
  bool weighted;
  const void* value;
  // deform_sample: locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P] in Real.
  const void* locations;
  const void* weights;
  // ms_deform_attn: reference [B, Q, L, 2 or 4] in Real; offsets and logits, in place of locations and weights, in the dtype
  // of the values (`narrow`) or in Real.
  const void* reference;
  int64_t reference_size;
  const void* offsets;
  const void* logits;
  bool narrow;
};

// Gradients: `out` is given, the others are written, each in the dtype of its tensor. grad_reference [B, Q,
// H, L, 2 or 4] holds each head's contribution, in Real, or is null if not needed.
struct SampleGrads {
  const void* out;
  void* grad_locations;
  void* grad_weights;
  void* grad_reference;
  void* grad_offsets;
  void* grad_logits;
};

// The unit of work of a thread: some queries of some heads of an image. `value` is row 0 of the first of the heads,
// `grad_value` its gradient in Real; rows are `stride` and `grad_stride` numbers apart, heads D.
struct Part {
  int64_t image, head_begin, head_end, query_begin, query_end;
  const void* value;
  int64_t stride;
  void* grad_value;
  int64_t grad_stride;
};

// The most numbers that a register holds.
constexpr int kMaxLanes = 16;

// Bytes of scratch memory, aligned to registers, that `forward` and `backward` need.
// Batch has 34 arrays of L * P numbers, each filled up to whole registers and one more.
inline int64_t scratch_bytes(const SampleArgs& args) {
  return 34 * (args.L * args.P + 2 * kMaxLanes) * static_cast<int64_t>(sizeof(double));
}

struct SampleKernels {
  void (*forward)(const SampleArgs& args, const Part& part, void* out, void* scratch);
  // Adds to grad_value: parts that run concurrently must not write the same rows and channels.
  void (*backward)(const SampleArgs& args, const Part& part, const SampleGrads& grads, void* scratch);
  // Writes the sum over `copies` of `count` rows of D numbers in Real, `copy_stride` numbers apart, as rows of values that
  // are `stride` numbers apart.
  void (*write_rows)(
      const SampleArgs& args, const void* sums, int64_t copies, int64_t copy_stride, void* rows, int64_t stride,
      int64_t count);
};

// Run the kernels in parallel. Outputs and gradients are [B, Q, H, ...] as their ops describe; grad_value is written, not
// added to, in the dtype of value.
void sample_forward(const SampleArgs& args, void* out);
void sample_backward(const SampleArgs& args, const SampleGrads& grads, void* grad_value);

}  // namespace dat
