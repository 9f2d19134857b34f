// Kernels of neighborhood_attn for every CPU: 128-bit vectors (SSE2, NEON).
#define DAT_ISA baseline
#define DAT_VECTOR_BYTES 16
#include "neighborhood_kernels.h"

namespace dat {

const NeighborhoodKernels& neighborhood_baseline() { return baseline::kNeighborhood; }

}  // namespace dat
