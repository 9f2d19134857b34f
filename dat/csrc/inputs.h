// Checks and preparation of inputs that the CPU and CUDA registrations of the sampling ops have in common.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "bilinear.h"

namespace dat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Levels of the flat list (h_0, w_0, h_1, ...), which must have S pixels.
inline std::vector<Level> make_levels(const char* op, const std::vector<int64_t>& shapes, int64_t S) {
  // Rows are counted in 32 bits; bytes and elements are not.
  STD_TORCH_CHECK(S < INT32_MAX, op, ": the levels must have fewer than 2**31 pixels, got ", S);
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t l = 0; l + 1 < shapes.size(); l += 2) {
    levels.push_back({static_cast<int>(shapes[l]), static_cast<int>(shapes[l + 1]), static_cast<int>(start)});
    start += shapes[l] * shapes[l + 1];
  }
  STD_TORCH_CHECK(start == S, op, ": shapes must have S = ", S, " pixels, got ", start);
  return levels;
}

// The dtype of the sums.
inline ScalarType real_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_real(const char* op, const Tensor& value, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == real_type(value), op, ": ", name, " must be float64 for float64 values, else float32");
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

}  // namespace dat
