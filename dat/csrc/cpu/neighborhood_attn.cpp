// Registers neighborhood_attn and its backward for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "neighborhood.h"
#include "registration.h"

namespace dat {
namespace {

// Strided views of a fused qkv projection are used as they are; other layouts are copied.
Tensor with_channels_side_by_side(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) < 2 ? tensor : torch::stable::contiguous(tensor);
}

HeadPixels pixels_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A new tensor for `tensor`'s [B, heads, pixels, C] with the heads of a pixel side by side: [B, pixels, heads, C].
Tensor new_pixels(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)});
}

constexpr const char* kOp = "neighborhood_attn";

// Raises unless the arguments of a call fit together.
void check(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, int64_t height,
    int64_t width, int64_t kernel, int64_t dilation) {
  STD_TORCH_CHECK(kernel > 0 && kernel % 2 == 1, kOp, ": kernel_size must be odd and positive, got ", kernel);
  STD_TORCH_CHECK(dilation > 0, kOp, ": dilation must be at least 1, got ", dilation);
  check_size(kOp, height, width);
  STD_TORCH_CHECK(
      kernel <= height / dilation && kernel <= width / dilation, kOp,
      ": height and width must be at least kernel_size * dilation, got ", height, " x ", width, " for ", kernel, " * ",
      dilation);
  check_shape(kOp, query, "query", {kAny, kAny, height * width, kAny});
  const int64_t heads = query.size(1), side = 2 * kernel - 1;
  check_shape(kOp, key, "key", {query.size(0), heads, query.size(2), query.size(3)});
  check_shape(kOp, value, "value", {query.size(0), heads, query.size(2), query.size(3)});
  check_dtype(kOp, key, "key", query, "query");
  check_dtype(kOp, value, "value", query, "query");
  if (!bias) return;
  check_shape(kOp, *bias, "bias", {heads, side, side});
  check_real(kOp, query, *bias, "bias");
}

// The tensors of a call and the arguments that point to them.
struct Inputs {
  Tensor query, key, value;
  std::optional<Tensor> bias;
  NeighborhoodArgs args = {};

  Inputs(
      const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& bias_, int64_t height,
      int64_t width, int64_t kernel, int64_t dilation, double scale)
      : query(with_channels_side_by_side(query_)),
        key(with_channels_side_by_side(key_)),
        value(with_channels_side_by_side(value_)),
        bias(contiguous(bias_)) {
    args.type = value_type(kOp, query);
    args.B = query.size(0), args.heads = query.size(1), args.H = height, args.W = width, args.C = query.size(3);
    args.kernel = kernel, args.dilation = dilation, args.scale = scale;
    args.query = pixels_of(query), args.key = pixels_of(key), args.value = pixels_of(value);
    args.bias = bias ? bias->const_data_ptr() : nullptr;
  }
};

Tensor forward(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, int64_t height, int64_t width, int64_t kernel,
    int64_t dilation, double scale) {
  check(query, key, value, bias, height, width, kernel, dilation);
  const Inputs inputs(query, key, value, bias, height, width, kernel, dilation, scale);
  Tensor out = new_pixels(inputs.query);
  neighborhood_forward(inputs.args, out.mutable_data_ptr());
  return torch::stable::transpose(out, 1, 2);
}

// The CPU's sums are always taken in a fixed order.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, int64_t height, int64_t width,
    int64_t kernel, int64_t dilation, double scale) {
  check(query, key, value, bias, height, width, kernel, dilation);
  const Inputs inputs(query, key, value, bias, height, width, kernel, dilation, scale);
  check_shape(kOp, grad, "grad", {query.size(0), query.size(1), query.size(2), query.size(3)});
  check_dtype(kOp, grad, "grad", query, "query");
  grad = with_channels_side_by_side(grad);
  Tensor grad_query = new_pixels(inputs.query), grad_key = new_pixels(inputs.key), grad_value = new_pixels(inputs.value);
  // Without a bias its empty gradient still has the dtype of the sums.
  const std::vector<int64_t> bias_size =
      bias ? std::vector<int64_t>{bias->size(0), bias->size(1), bias->size(2)} : std::vector<int64_t>{0};
  Tensor grad_bias = torch::stable::new_empty(inputs.query, bias_size, real_type(inputs.query));
  neighborhood_backward(
      inputs.args, pixels_of(grad), grad_query.mutable_data_ptr(), grad_key.mutable_data_ptr(),
      grad_value.mutable_data_ptr(), bias ? grad_bias.mutable_data_ptr() : nullptr);
  const auto heads_first = [](const Tensor& pixels) { return torch::stable::transpose(pixels, 1, 2); };
  return {heads_first(grad_query), heads_first(grad_key), heads_first(grad_value), grad_bias};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("neighborhood_attn", TORCH_BOX(&dat::forward));
  m.impl("neighborhood_attn_backward", TORCH_BOX(&dat::backward));
}
