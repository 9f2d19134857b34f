// Chooses the kernels for this CPU.
#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace dat {
namespace {

const Kernels& choose_kernels() {
#if defined(__x86_64__)
  // Tests run the kernels of every instruction set on one machine.
  const char* variable = std::getenv("DAT_CPU_CAPABILITY");
  const std::string wanted = variable && *variable ? variable : "AVX512";
  STD_TORCH_CHECK(
      wanted == "DEFAULT" || wanted == "AVX2" || wanted == "AVX512",
      "DAT_CPU_CAPABILITY must be DEFAULT, AVX2 or AVX512, got ", wanted);
  if (wanted == "AVX512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512Kernels;
  if (wanted != "DEFAULT" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace dat

STABLE_TORCH_LIBRARY_FRAGMENT(dat, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dat, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&dat::cpu_capability)); }
