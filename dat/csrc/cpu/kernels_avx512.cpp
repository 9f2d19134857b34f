// Kernels for CPUs with AVX-512.
#if defined(__x86_64__)

#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define DAT_ISA avx512
#define DAT_VECTOR_BYTES 64
#include "all_kernels.h"

constinit const dat::Kernels dat::kAvx512Kernels = dat::DAT_ISA::make_kernels("AVX512");

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
