// The gradient by value in a fixed order, for tensors.
#include <array>

#include "tensors.h"

namespace dat {
namespace {

// Sorts keys on the device, equal ones in the order they came in: aten::sort.stable.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack = {
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace

cudaError_t sum_deterministically(
    const Geometry& g, const Tensor& pixels, const std::optional<Tensor>& weights, bool row_per_sample, const Tensor& grad,
    Tensor& grad_value) {
  // Tensors of a batch may be freed before its kernels end: their memory is reused on the same stream only.
  std::tuple<Tensor, Tensor> sorted;
  const auto sort = [&](int64_t size, const auto& fill) {
    Tensor keys = torch::stable::new_empty(pixels, {size}, ScalarType::Int);
    fill(mutable_data<int>(keys));
    sorted = stable_sort(keys);
    return Order{data<int>(std::get<0>(sorted)), data<int64_t>(std::get<1>(sorted))};
  };
  cudaError_t error = cudaSuccess;
  with_type("backward", grad, [&]<typename T>(T) {
    using Real = typename RealOf<T>::type;
    const KeptInput<Real> kept = {data<Real>(pixels), data<Real>(weights)};
    error = run_deterministic<T, Real>(
        g, kept, row_per_sample, data<T>(grad), mutable_data<Real>(grad_value), aligned(grad), kMaxBatch,
        current_stream(grad), sort);
  });
  return error;
}

}  // namespace dat
