// The kernels of all ops for one instruction set, and the choice among them at run time.
#pragma once

#include "attention.h"
#include "neighborhood.h"
#include "sampling.h"

namespace dat {

struct Kernels {
  // The name of the instruction set, as DAT_CPU_CAPABILITY takes it.
  const char* name;
  AttentionKernels attention;
  NeighborhoodKernels neighborhood;
  SampleKernels sampling;
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// Those of the best instruction set that this CPU has and DAT_CPU_CAPABILITY allows.
const Kernels& kernels();

}  // namespace dat
