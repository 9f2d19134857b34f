// What the libraries have in common that tests call to run kernels on the host.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {
extern bool last_lane_first;
extern unsigned max_grid;
}  // namespace emulator

// The same fields as in the tests.
struct Buffer {
  void* data;
  int64_t bytes;

  template <typename U>
  checked::Pointer<U> as() const {
    if (!data) return nullptr;
    return checked::Pointer<U>(static_cast<U*>(data), bytes / static_cast<int64_t>(sizeof(U)));
  }
};

// Memory that the registration would take from torch, full of NaN.
template <typename Real>
struct Scratch {
  std::vector<Real> numbers;

  checked::Pointer<Real> take(bool wanted, int64_t count) {
    if (!wanted) return nullptr;
    numbers.assign(static_cast<size_t>(std::max<int64_t>(1, count)), std::numeric_limits<Real>::quiet_NaN());
    return checked::Pointer<Real>(numbers.data(), count);
  }
};

inline void require(cudaError_t error) {
  if (error != cudaSuccess) checked::fail("launch error " + std::to_string(error));
}

// Null, or what went wrong in `call`, until the next one.
template <typename Run>
const char* error_of(const Run& call) {
  static std::string error;
  try {
    call();
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}
