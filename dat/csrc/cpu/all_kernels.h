// The kernels of all ops, for the instruction set that DAT_ISA and DAT_VECTOR_BYTES name: see vector.h.
#pragma once

#include "attention_kernels.h"
#include "kernels.h"
#include "neighborhood_kernels.h"
#include "sampling_kernels.h"

namespace dat {
namespace DAT_ISA {

constexpr Kernels make_kernels(const char* name) {
  return {name, attention::kKernels, neighborhood::kKernels, sampling::kKernels};
}

}  // namespace DAT_ISA
}  // namespace dat
