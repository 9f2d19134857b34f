// Runs the kernels of layer_norm on the host for tests/ops/test_layer_norm.py.
#include <string>

#include "calls.h"
// The stand-in for CUDA comes first.
#include "../../dat/csrc/cuda/layer_norm.cuh"

// The same fields as in the test. `grad` is null for the forward.
struct Call {
  int64_t rows, C, processors, last_lane_first;
  double eps;
  Buffer x, branch, weight, bias, sum, out, grad, grad_sum, grad_x, grad_branch, grad_weight, grad_bias;
};

namespace {

template <typename X, typename Branch, typename Y>
void run_call(const Call& c) {
  const dat::NormRows n = dat::make_rows(c.rows, c.C, c.eps);
  const auto x = c.x.as<const X>();
  const auto weight = c.weight.as<const float>(), bias = c.bias.as<const float>();
  const auto grad = c.grad.as<const Y>();
  if (!grad)
    return require(
        dat::run_norm<X, Branch, Y>(n, x, c.branch.as<const Branch>(), weight, bias, c.sum.as<X>(), c.out.as<Y>(), nullptr));
  Scratch<float> parts;
  require(
      dat::run_norm_grad<X, Branch, Y>(
          n, static_cast<int>(c.processors), grad, c.grad_sum.as<const X>(), x, weight, c.grad_x.as<X>(),
          c.grad_branch.as<Branch>(), c.grad_weight.as<float>(), c.grad_bias.as<float>(), nullptr,
          [&](int64_t count) { return parts.take(true, count); }));
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* run(const Call* call, const char* dtypes) {
  emulator::last_lane_first = call->last_lane_first;
  return error_of([&] {
    const std::string names = dtypes;
    if (names == "torch.float32 torch.float32 torch.float32") run_call<float, float, float>(*call);
    if (names == "torch.float32 torch.bfloat16 torch.float32") run_call<float, __nv_bfloat16, float>(*call);
    if (names == "torch.float32 torch.float16 torch.float32") run_call<float, __half, float>(*call);
    if (names == "torch.float32 torch.bfloat16 torch.bfloat16") run_call<float, __nv_bfloat16, __nv_bfloat16>(*call);
    if (names == "torch.float32 torch.float16 torch.float16") run_call<float, __half, __half>(*call);
    if (names == "torch.bfloat16 torch.float32 torch.float32") run_call<__nv_bfloat16, float, float>(*call);
    if (names == "torch.float16 torch.float32 torch.float32") run_call<__half, float, float>(*call);
  });
}
