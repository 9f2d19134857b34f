// Registers neighborhood_attn and its backward for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "neighborhood.h"
#include "registration.h"

namespace dat {
namespace {

// As views of a projection to query, key and value are; anything else is copied.
Tensor with_channels_side_by_side(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) < 2 ? tensor : torch::stable::contiguous(tensor);
}

HeadCells cells_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Of the shape of `tensor` [B, heads, cells, C], heads of a cell side by side in memory: [B, cells, heads, C].
Tensor new_cells(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)});
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
    constexpr const char* kOp = "neighborhood_attn";
    const int64_t window = kernel * dilation;
    STD_TORCH_CHECK(
        height >= window && width >= window, kOp, ": height and width must be at least kernel_size * dilation = ", window);
    STD_TORCH_CHECK(query.dim() == 4 && query.size(2) == height * width, kOp, ": query must be [B, h, height * width, c]");
    for (const Tensor* other : {&key, &value}) {
      bool fits = other->dim() == 4 && other->scalar_type() == query.scalar_type();
      for (int64_t d = 0; fits && d < 4; d++) fits = other->size(d) == query.size(d);
      STD_TORCH_CHECK(fits, kOp, ": key and value must have the shape and dtype of query");
    }
    args.type = value_type(kOp, query);
    args.B = query.size(0), args.heads = query.size(1), args.H = height, args.W = width, args.C = query.size(3);
    args.kernel = kernel, args.dilation = dilation, args.scale = scale;
    args.query = cells_of(query), args.key = cells_of(key), args.value = cells_of(value);
    if (bias) {
      check_real(kOp, query, *bias, "bias");
      const int64_t side = 2 * kernel - 1;
      STD_TORCH_CHECK(
          bias->dim() == 3 && bias->size(0) == args.heads && bias->size(1) == side && bias->size(2) == side, kOp,
          ": bias must be [h, 2 * kernel_size - 1, 2 * kernel_size - 1]");
      args.bias = bias->const_data_ptr();
    }
  }
};

Tensor forward(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, int64_t height, int64_t width, int64_t kernel,
    int64_t dilation, double scale) {
  const Inputs inputs(query, key, value, bias, height, width, kernel, dilation, scale);
  Tensor out = new_cells(inputs.query);
  neighborhood_forward(inputs.args, out.mutable_data_ptr());
  return torch::stable::transpose(out, 1, 2);
}

// The CPU's sums are always taken in a fixed order.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, int64_t height, int64_t width,
    int64_t kernel, int64_t dilation, double scale, bool /*deterministic*/) {
  const Inputs inputs(query, key, value, bias, height, width, kernel, dilation, scale);
  grad = with_channels_side_by_side(grad);
  Tensor by_query = new_cells(inputs.query), by_key = new_cells(inputs.key), by_value = new_cells(inputs.value);
  // Where there is no bias the dtype is still that of the sums.
  const std::vector<int64_t> bias_size =
      bias ? std::vector<int64_t>{bias->size(0), bias->size(1), bias->size(2)} : std::vector<int64_t>{0};
  Tensor by_bias = torch::stable::new_empty(inputs.query, bias_size, real_type(inputs.query));
  neighborhood_backward(
      inputs.args, cells_of(grad), by_query.mutable_data_ptr(), by_key.mutable_data_ptr(), by_value.mutable_data_ptr(),
      bias ? by_bias.mutable_data_ptr() : nullptr);
  const auto heads_first = [](const Tensor& cells) { return torch::stable::transpose(cells, 1, 2); };
  return {heads_first(by_query), heads_first(by_key), heads_first(by_value), by_bias};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("neighborhood_attn", TORCH_BOX(&dat::forward));
  m.impl("neighborhood_attn_backward", TORCH_BOX(&dat::backward));
}
