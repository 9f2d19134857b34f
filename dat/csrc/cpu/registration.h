// Checks of raw calls of the ops on CPU tensors: kernels index without bounds, so nothing inconsistent may reach them.
#pragma once

#include <initializer_list>
#include <string>

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

// A size that fits any other.
constexpr int64_t kAny = -1;

template <typename Sizes>
std::string to_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == kAny ? "*" : std::to_string(size));
  return "[" + text + "]";
}

inline void check_shape(const char* op, const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool fits = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t dim = 0;
  for (const int64_t size : expected) {
    fits = fits && (size == kAny || tensor.size(dim) == size);
    dim++;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ", to_text(expected), ", got ", to_text(tensor.sizes()));
}

inline void check_dtype(const char* op, const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must be in the dtype of ", like_name);
}

// Height and width of a map, neither negative nor beyond 32 bits: their product cannot overflow.
inline void check_size(const char* op, int64_t height, int64_t width) {
  const bool fits = 0 <= height && height <= INT32_MAX && 0 <= width && width <= INT32_MAX;
  STD_TORCH_CHECK(fits, op, ": sizes must be at least 0 and below 2**31, got ", height, " x ", width);
}

// The levels of `value` [B, S, H, D] for the flat list (h_0, w_0, h_1, ...).
inline std::vector<Level> check_value(const char* op, const Tensor& value, const std::vector<int64_t>& shapes) {
  check_shape(op, value, "value", {kAny, kAny, kAny, kAny});
  STD_TORCH_CHECK(shapes.size() % 2 == 0, op, ": shapes must be (h_0, w_0, h_1, ...), got ", shapes.size(), " ints");
  for (size_t l = 0; l < shapes.size(); l += 2) {
    check_size(op, shapes[l], shapes[l + 1]);
    // A single level is limited to the rows of `value`, so that the sum over all cannot overflow.
    STD_TORCH_CHECK(
        shapes[l] * shapes[l + 1] <= value.size(1), op, ": level ", l / 2,
        " must fit into the rows of value, S = ", value.size(1), ", got ", shapes[l], " x ", shapes[l + 1]);
  }
  return make_levels(op, shapes, value.size(1));
}

// The arguments that describe `value`; each op adds where it is sampled.
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
