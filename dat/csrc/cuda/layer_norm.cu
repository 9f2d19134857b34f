// Registers layer_norm and its backward for CUDA tensors.
#include "layer_norm.cuh"
#include "tensors.h"

namespace dat {
namespace {

constexpr const char* kLayerNorm = "layer_norm";

// Calls call(X(), Branch(), Y()) with the types of `x`, of a branch that is added to it and of their norm.
template <typename Call>
void with_norm_types(const Tensor& x, std::optional<ScalarType> branch, ScalarType norm, const Call& call) {
  constexpr ScalarType kFloat = ScalarType::Float, kBFloat = ScalarType::BFloat16, kHalf = ScalarType::Half;
  const auto run = [&](auto of_x, auto of_branch, auto of_norm) {
    check_launch(kLayerNorm, x, call(of_x, of_branch, of_norm));
  };
  const ScalarType of_x = x.scalar_type(), of_branch = branch.value_or(of_x == kFloat ? norm : kFloat);
  if (of_x == kFloat && of_branch == kFloat && norm == kFloat) return run(float(), float(), float());
  if (of_x == kFloat && of_branch == kBFloat && norm == kFloat) return run(float(), __nv_bfloat16(), float());
  if (of_x == kFloat && of_branch == kHalf && norm == kFloat) return run(float(), __half(), float());
  if (of_x == kFloat && of_branch == kBFloat && norm == kBFloat) return run(float(), __nv_bfloat16(), __nv_bfloat16());
  if (of_x == kFloat && of_branch == kHalf && norm == kHalf) return run(float(), __half(), __half());
  if (!branch && of_x == kBFloat && norm == kFloat) return run(__nv_bfloat16(), float(), float());
  if (!branch && of_x == kHalf && norm == kFloat) return run(__half(), float(), float());
  STD_TORCH_CHECK(
      false, kLayerNorm,
      ": x must be float32, and the result float32 or in the dtype of the branch; without a branch x or the result must be "
      "float32, and the other float32, bfloat16 or float16");
}

NormRows checked_rows(const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.dim() > 0, kLayerNorm, ": x must have a dimension of channels");
  const int64_t C = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      C > 0 && C % kPack == 0 && C <= kNormChannels, kLayerNorm, ": channels must be a multiple of 4 up to ", kNormChannels,
      ", got ", C);
  check_tensor(kLayerNorm, "weight", x, weight, {C});
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, kLayerNorm, ": weight must be float32");
  return make_rows(x.numel() / C, C, eps);
}

// A tensor of the shape of `x`, or none.
std::optional<Tensor> checked(const char* name, const Tensor& x, const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  const auto sizes = tensor->sizes(), wanted = x.sizes();
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()) &&
          tensor->get_device_index() == x.get_device_index(),
      kLayerNorm, ": ", name, " must have the shape and device of x");
  return packed(*tensor);
}

const std::vector<int64_t> kNone = {0};

std::tuple<Tensor, Tensor> forward(
    Tensor x, std::optional<Tensor> branch, Tensor weight, Tensor bias, double eps, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const NormRows n = checked_rows(x, weight, eps);
  check_tensor(kLayerNorm, "bias", x, bias, {n.C});
  STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float, kLayerNorm, ": bias must be float32");
  const std::optional<ScalarType> of_branch = branch ? std::optional<ScalarType>(branch->scalar_type()) : std::nullopt;
  branch = checked("branch", x, branch);
  x = packed(x), weight = packed(weight), bias = packed(bias);
  Tensor sum = empty(x, branch ? x.sizes() : kNone), out = empty(x, x.sizes(), dtype);
  with_norm_types(x, of_branch, dtype, [&]<typename X, typename Branch, typename Y>(X, Branch, Y) {
    return run_norm<X, Branch, Y>(
        n, data<X>(x), data<Branch>(branch), data<float>(weight), data<float>(bias), mutable_data<X>(sum),
        mutable_data<Y>(out), current_stream(x));
  });
  return {out, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, std::optional<Tensor> grad_sum, Tensor x, Tensor weight, double eps, std::optional<ScalarType> branch,
    bool with_weight) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const NormRows n = checked_rows(x, weight, eps);
  const ScalarType dtype = grad.scalar_type();
  grad = *checked("grad", x, grad), grad_sum = checked("grad_sum", x, grad_sum);
  STD_TORCH_CHECK(
      !grad_sum || grad_sum->scalar_type() == x.scalar_type(), kLayerNorm, ": grad_sum must have the dtype of x");
  x = packed(x), weight = packed(weight);
  const std::vector<int64_t> channels = {n.C};
  Tensor grad_x = empty(x, x.sizes()), grad_branch = empty(x, branch ? x.sizes() : kNone, branch),
         grad_weight = empty(weight, with_weight ? channels : kNone),
         grad_bias = empty(weight, with_weight ? channels : kNone);
  with_norm_types(x, branch, dtype, [&]<typename X, typename Branch, typename Y>(X, Branch, Y) {
    std::optional<Tensor> parts;
    return run_norm_grad<X, Branch, Y>(
        n, multiprocessors(kLayerNorm, x), data<Y>(grad), data<X>(grad_sum), data<X>(x), data<float>(weight),
        mutable_data<X>(grad_x), branch ? mutable_data<Branch>(grad_branch) : nullptr,
        with_weight ? mutable_data<float>(grad_weight) : nullptr, mutable_data<float>(grad_bias), current_stream(x),
        [&](int64_t count) { return mutable_data<float>(parts = empty(weight, {count})); });
  });
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&dat::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&dat::backward));
}
