// What the registrations of the sampling ops for CPU tensors have in common.
#pragma once

#include "../inputs.h"
#include "sampling.h"

namespace dat {

inline ValueType value_type(const char* op, const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float: return ValueType::kFloat32;
    case ScalarType::Double: return ValueType::kFloat64;
    case ScalarType::BFloat16: return ValueType::kBFloat16;
    case ScalarType::Half: return ValueType::kFloat16;
    default: STD_TORCH_CHECK(false, op, ": value must be float32, float64, bfloat16 or float16");
  }
}

// Sizes and values; where to sample them is for each op to say.
inline SampleArgs make_args(const char* op, const Tensor& value, const std::vector<Level>& levels, int64_t Q, int64_t P) {
  SampleArgs args = {};
  args.type = value_type(op, value);
  args.B = value.size(0), args.S = value.size(1), args.H = value.size(2), args.D = value.size(3);
  args.Q = Q, args.L = static_cast<int64_t>(levels.size()), args.P = P;
  args.levels = levels.data();
  args.value = value.const_data_ptr();
  return args;
}

}  // namespace dat
