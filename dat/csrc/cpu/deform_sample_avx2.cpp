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
#include "deform_sample_kernels.h"

namespace dat {

const SampleKernels& avx2_kernels() {
  static const SampleKernels kernels = {avx2::forward_any, avx2::backward_any};
  return kernels;
}

}  // namespace dat

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
