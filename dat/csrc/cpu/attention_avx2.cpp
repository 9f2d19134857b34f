// Kernels for CPUs with AVX2, chosen at run time.
#if defined(__x86_64__)

#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define DAT_ISA avx2
#define DAT_VECTOR_BYTES 32
#include "attention_kernels.h"

namespace dat {

const AttentionKernels& avx2_attention() { return avx2::kAttention; }

}  // namespace dat

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
