// Kernels for every CPU: 128-bit vectors (SSE2, NEON).
#define DAT_ISA baseline
#define DAT_VECTOR_BYTES 16
#include "sampling_kernels.h"

namespace dat {

const SampleKernels& baseline_kernels() { return baseline::kKernels; }

}  // namespace dat
