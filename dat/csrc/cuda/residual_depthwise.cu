// Registers residual_depthwise and its backward for CUDA tensors.
#include "residual_depthwise.cuh"
#include "tensors.h"

namespace dat {
namespace {

constexpr const char* kResidualDepthwise = "residual_depthwise";

struct Sizes {
  int64_t B, H, W, C;
};

Sizes checked_sizes(const Tensor& x, const Tensor& weight) {
  check_dimensions(kResidualDepthwise, "x", x, 4);
  const Sizes s = {x.size(0), x.size(1), x.size(2), x.size(3)};
  // A pixel's channels have taps, and a map's pixels columns, that are counted in 32 bits.
  STD_TORCH_CHECK(
      s.C > 0 && s.C % kPack == 0 && s.C <= INT32_MAX / kSums && s.H < INT32_MAX / 2 && s.W < INT32_MAX / 2,
      kResidualDepthwise, ": x must be [B, H, W, C] with C a multiple of 4, got C = ", s.C, ", or is too large");
  check_tensor(kResidualDepthwise, "weight", x, weight, {s.C, 1, 3, 3});
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, kResidualDepthwise, ": weight must be float32");
  return s;
}

// Calls call(T()) with the type of `x`.
template <typename Call>
void with_map_type(const Tensor& x, const Call& call) {
  with_type(kResidualDepthwise, x, [&]<typename T>(T zero) {
    if constexpr (std::is_same_v<T, double>) {
      STD_TORCH_CHECK(false, kResidualDepthwise, ": x must be float32, bfloat16 or float16");
    } else {
      check_launch(kResidualDepthwise, x, call(zero));
    }
  });
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto [B, H, W, C] = checked_sizes(x, weight);
  if (bias) {
    check_tensor(kResidualDepthwise, "bias", x, *bias, {C});
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, kResidualDepthwise, ": bias must be float32");
  }
  x = packed(x), weight = make_contiguous(weight), bias = contiguous(bias);
  Tensor out = empty(x, x.sizes());
  with_map_type(x, [&]<typename T>(T) {
    return run_convolve<T>(
        B, H, W, C, false, data<T>(x), data<float>(weight), data<float>(bias), mutable_data<T>(out), current_stream(x));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, bool with_weight) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto [B, H, W, C] = checked_sizes(x, weight);
  grad = packed(checked_grad(kResidualDepthwise, x, grad, {B, H, W, C}));
  x = packed(x), weight = make_contiguous(weight);
  const std::vector<int64_t> none = {0}, channels = {C};
  Tensor grad_x = empty(x, x.sizes()), grad_weight = empty(weight, with_weight ? weight.sizes() : none),
         grad_bias = empty(weight, with_weight ? channels : none);
  const int processors = multiprocessors(kResidualDepthwise, x);
  const cudaStream_t stream = current_stream(x);
  with_map_type(x, [&]<typename T>(T) {
    const cudaError_t error =
        run_convolve<T>(B, H, W, C, true, data<T>(grad), data<float>(weight), nullptr, mutable_data<T>(grad_x), stream);
    if (error != cudaSuccess || !with_weight) return error;
    std::optional<Tensor> parts;
    return run_weight_grad<T>(
        B, H, W, C, processors, data<T>(grad), data<T>(x), mutable_data<float>(grad_weight), mutable_data<float>(grad_bias),
        stream, [&](int64_t count) { return mutable_data<float>(parts = empty(weight, {count})); });
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) {
  m.impl("residual_depthwise", TORCH_BOX(&dat::forward));
  m.impl("residual_depthwise_backward", TORCH_BOX(&dat::backward));
}
