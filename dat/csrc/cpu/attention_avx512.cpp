// Kernels for CPUs with AVX512, chosen at run time.
#if defined(__x86_64__)

#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define DAT_ISA avx512
#define DAT_VECTOR_BYTES 64
#include "attention_kernels.h"

namespace dat {

const AttentionKernels& avx512_attention() { return avx512::kAttention; }

}  // namespace dat

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
