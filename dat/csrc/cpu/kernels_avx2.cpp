// Kernels for CPUs with AVX2.
#if defined(__x86_64__)

#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define DAT_ISA avx2
#define DAT_VECTOR_BYTES 32
#include "all_kernels.h"

constinit const dat::Kernels dat::kAvx2Kernels = dat::DAT_ISA::make_kernels("AVX2");

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
