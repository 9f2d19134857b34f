// Tensors to kernel arguments, and what both registrations for CUDA share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../inputs.h"
#include "launch.cuh"

namespace dat {

inline Geometry checked_geometry(
    const char* op, const Tensor& value, const std::vector<int64_t>& shapes, int64_t Q, int64_t P, bool align_corners) {
  const std::vector<Level> levels = make_levels(op, shapes, value.size(1));
  const int64_t L = static_cast<int64_t>(levels.size());
  STD_TORCH_CHECK(L <= kMaxLevels, op, ": at most ", kMaxLevels, " levels on a CUDA device, got ", L);
  STD_TORCH_CHECK(
      P <= INT32_MAX / std::max<int64_t>(1, L), op, ": a head must have fewer than 2**31 samples, got ", L, " levels of ", P,
      " points");
  return make_geometry(value.size(0), value.size(2), value.size(3), Q, P, levels, align_corners);
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
      DAT_CUDA_ARCHITECTURES, "; this device needs ", device.major, ".", device.minor, ")");
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

// Sorts keys on the device, equal ones in the order they came in: aten::sort.stable.
inline std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack = {
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Adds the gradient by value in the same order every time, from what the backward kernels kept of the samples.
template <typename T, typename Real>
cudaError_t sum_deterministically(
    const Geometry& g, const Tensor& pixels, const std::optional<Tensor>& weights, bool row_per_sample, const Tensor& grad,
    Tensor& by_value) {
  const KeptInput<Real> kept = {data<Real>(pixels), data<Real>(weights)};
  // Tensors of a batch outlive its kernels: memory goes back to the stream that they run on.
  std::tuple<Tensor, Tensor> sorted;
  const auto sort = [&](int64_t size, const auto& fill) {
    Tensor keys = torch::stable::new_empty(pixels, {size}, ScalarType::Int);
    fill(mutable_data<int>(keys));
    sorted = stable_sort(keys);
    return Order{data<int>(std::get<0>(sorted)), data<int64_t>(std::get<1>(sorted))};
  };
  return run_deterministic<T, Real>(
      g, kept, row_per_sample, data<T>(grad), mutable_data<Real>(by_value), aligned(grad), kMaxBatch, current_stream(grad),
      sort);
}

}  // namespace dat
