// Kernels for every CPU: 128-bit vectors (SSE2, NEON).
#define DAT_ISA baseline
#define DAT_VECTOR_BYTES 16
#include "all_kernels.h"

constinit const dat::Kernels dat::kBaselineKernels = dat::DAT_ISA::make_kernels("DEFAULT");
