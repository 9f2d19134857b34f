// Kernels for every CPU: 128-bit vectors (SSE2, NEON).
#define DAT_ISA baseline
#define DAT_VECTOR_BYTES 16
#include "deform_sample_kernels.h"

namespace dat {

const SampleKernels& baseline_kernels() {
  static const SampleKernels kernels = {baseline::forward_any, baseline::backward_any};
  return kernels;
}

}  // namespace dat
