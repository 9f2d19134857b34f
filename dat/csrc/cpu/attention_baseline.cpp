// Kernels for every CPU: 128-bit vectors (SSE2, NEON).
#define DAT_ISA baseline
#define DAT_VECTOR_BYTES 16
#include "attention_kernels.h"

namespace dat {

const AttentionKernels& baseline_attention() { return baseline::kAttention; }

}  // namespace dat
