// Runs the kernels of residual_depthwise on the host for tests/ops/test_residual_depthwise.py.
#include <string>

#include "calls.h"
// The stand-in for CUDA comes first.
#include "../../dat/csrc/cuda/residual_depthwise.cuh"

// The same fields as in the test. `grad` is null for the forward.
struct Call {
  int64_t B, H, W, C, processors, last_lane_first;
  Buffer x, weight, bias, out, grad, grad_x, grad_weight, grad_bias;
};

namespace {

template <typename T>
void run_call(const Call& c) {
  const auto x = c.x.as<const T>(), grad = c.grad.as<const T>();
  const auto weight = c.weight.as<const float>();
  if (!grad)
    return require(
        dat::run_convolve<T>(c.B, c.H, c.W, c.C, false, x, weight, c.bias.as<const float>(), c.out.as<T>(), nullptr));
  require(dat::run_convolve<T>(c.B, c.H, c.W, c.C, true, grad, weight, nullptr, c.grad_x.as<T>(), nullptr));
  Scratch<float> parts;
  const auto take = [&](int64_t count) { return parts.take(true, count); };
  require(
      dat::run_weight_grad<T>(
          c.B, c.H, c.W, c.C, static_cast<int>(c.processors), grad, x, c.grad_weight.as<float>(), c.grad_bias.as<float>(),
          nullptr, take));
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* run(const Call* call, const char* dtype) {
  emulator::last_lane_first = call->last_lane_first;
  return error_of([&] {
    const std::string name = dtype;
    if (name == "torch.float32") run_call<float>(*call);
    if (name == "torch.bfloat16") run_call<__nv_bfloat16>(*call);
    if (name == "torch.float16") run_call<__half>(*call);
  });
}
