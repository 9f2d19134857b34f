// Conversion of tensors to kernel arguments, and helpers of both CUDA registrations.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../inputs.h"
#include "launch.cuh"

namespace dat {

inline Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Memory for `sizes` on the device of `like`, and in its dtype unless another is given. torch::stable::new_empty finds its
// operator by name in each call, which costs a small call more than the memory does.
inline Tensor empty(
    const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  int32_t dtype = 0, device = 0;
  if (type) {
    dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device, like.get_device_index(), &tensor));
  return Tensor(tensor);
}

// Raises unless `tensor` is on the device of `value` and has the given sizes.
inline void check_tensor(
    const char* op, const char* name, const Tensor& value, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(
      tensor.get_device_index() == value.get_device_index(), op, ": ", name,
      " must be on the device of value, cuda:", value.get_device_index());
  const auto got = tensor.sizes();
  if (std::equal(got.begin(), got.end(), sizes.begin(), sizes.end())) return;
  const auto list = [](const auto& all) {
    std::string text;
    for (int64_t size : all) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  };
  STD_TORCH_CHECK(false, op, ": ", name, " must be ", list(sizes), ", got ", list(got));
}

// Raises unless `tensor` has `count` dimensions.
inline void check_dimensions(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(tensor.dim() == count, op, ": ", name, " must have ", count, " dimensions, got ", tensor.dim());
}

// `points` is [B, Q, H, L, P, 2], locations or offsets.
inline Geometry checked_geometry(
    const char* op, const Tensor& value, const std::vector<int64_t>& shapes, const char* name, const Tensor& points,
    bool align_corners) {
  check_dimensions(op, "value", value, 4);
  check_dimensions(op, name, points, 6);
  STD_TORCH_CHECK(shapes.size() % 2 == 0, op, ": shapes must be (h_0, w_0, h_1, ...), got ", shapes.size(), " sizes");
  for (int64_t size : shapes)
    STD_TORCH_CHECK(0 <= size && size <= INT32_MAX, op, ": shapes must be at least 0 and below 2**31, got ", size);
  const std::vector<Level> levels = make_levels(op, shapes, value.size(1));
  const int64_t L = static_cast<int64_t>(levels.size()), Q = points.size(1), P = points.size(4);
  STD_TORCH_CHECK(L <= kMaxLevels, op, ": at most ", kMaxLevels, " levels on a CUDA device, got ", L);
  STD_TORCH_CHECK(
      P <= INT32_MAX / std::max<int64_t>(1, L), op, ": a head must have fewer than 2**31 samples, got ", L, " levels of ", P,
      " points");
  check_tensor(op, name, value, points, {value.size(0), Q, value.size(2), L, P, 2});
  return make_geometry(value.size(0), value.size(2), value.size(3), Q, P, levels, align_corners);
}

// The output's gradient, contiguous.
inline Tensor checked_grad(const char* op, const Tensor& value, const Tensor& grad, std::initializer_list<int64_t> sizes) {
  check_tensor(op, "grad", value, grad, sizes);
  STD_TORCH_CHECK(grad.scalar_type() == value.scalar_type(), op, ": grad must be in the dtype of value");
  return make_contiguous(grad);
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

inline bool aligned(const Tensor& tensor) { return aligned(static_cast<const char*>(tensor.const_data_ptr())); }

// For kernels that read four neighbouring channels at once, which a slice of other memory need not be aligned for.
inline Tensor packed(const Tensor& tensor) {
  const Tensor dense = make_contiguous(tensor);
  return aligned(dense) ? dense : torch::stable::clone(dense);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, const Tensor& tensor, cudaError_t error) {
  if (error == cudaSuccess) return;
  // The runtime keeps the error of a failed launch, and the next call that asks would be blamed for it.
  cudaGetLastError();
  cudaDeviceProp device = {};
  cudaGetDeviceProperties(&device, tensor.get_device_index());
  STD_TORCH_CHECK(
      false, op, " did not launch on ", device.name, ": ", cudaGetErrorString(error), " (dat was built for ",
      DAT_CUDA_ARCHITECTURES, "; this device needs ", device.major, ".", device.minor,
      ", as TORCH_CUDA_ARCH_LIST says when dat is installed)");
}

inline int multiprocessors(const char* op, const Tensor& tensor) {
  int count = 0;
  check_launch(op, tensor, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

// Sums of gradients by `value` that are still zero.
inline Tensor zero_sums(const char* op, const Tensor& value) {
  Tensor sums = empty(value, value.sizes(), real_type(value));
  const size_t bytes = static_cast<size_t>(sums.numel()) * (real_type(value) == ScalarType::Double ? 8 : 4);
  if (bytes) check_launch(op, value, cudaMemsetAsync(sums.mutable_data_ptr(), 0, bytes, current_stream(value)));
  return sums;
}

// Calls call(T()) with the type of `value`.
template <typename Call>
void with_type(const char* op, const Tensor& value, const Call& call) {
  switch (value.scalar_type()) {
    case ScalarType::Float: return call(float());
    case ScalarType::Double: return call(double());
    case ScalarType::BFloat16: return call(__nv_bfloat16());
    case ScalarType::Half: return call(__half());
    default: STD_TORCH_CHECK(false, op, ": value must be float32, float64, bfloat16 or float16");
  }
}

// Adds grad_value in the same order every time, from the samples that the backward kernels saved.
cudaError_t sum_deterministically(
    const Geometry& g, const Tensor& pixels, const std::optional<Tensor>& weights, bool row_per_sample, const Tensor& grad,
    Tensor& grad_value);

}  // namespace dat
