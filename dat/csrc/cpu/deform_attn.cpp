// Registers deform_attn and its backward for CPU tensors, and divides their work among threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../inputs.h"
#include "kernels.h"
#include "registration.h"
#include "scratch.h"

namespace dat {
namespace {

// Writes `count` coordinates of a side of `length` queries, -1..1 or beyond, with the arithmetic of the reference.
template <typename Real>
void write_grid(Real* grid, int64_t count, int64_t length, bool align_corners) {
  const Real last = static_cast<Real>(std::max<int64_t>(length - 1, 1));
  for (int64_t i = 0; i < count; i++)
    grid[i] = (align_corners ? Real(i) / last : (Real(i) + Real(0.5)) / Real(length)) * 2 - 1;
}

constexpr const char* kOp = "deform_attn";

// Raises unless the arguments of a call fit together.
void check(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& positions, const std::optional<Tensor>& table,
    const std::vector<int64_t>& size) {
  value_type(kOp, query);
  STD_TORCH_CHECK(size.size() == 2, kOp, ": size must be (H, W), got ", size.size(), " ints");
  check_size(kOp, size[0], size[1]);
  check_shape(kOp, query, "query", {kAny, kAny, size[0] * size[1], kAny});
  const int64_t B = query.size(0), h = query.size(1);
  check_shape(kOp, key, "key", {B, h, kAny, query.size(3)});
  check_shape(kOp, value, "value", {B, h, key.size(2), query.size(3)});
  check_dtype(kOp, key, "key", query, "query");
  check_dtype(kOp, value, "value", query, "query");
  check_shape(kOp, positions, "positions", {B, kAny, key.size(2), 2});
  check_real(kOp, query, positions, "positions");
  const int64_t groups = positions.size(1);
  STD_TORCH_CHECK(
      groups > 0 && h % groups == 0, kOp, ": positions must have a divisor of ", h, " heads as groups, got ", groups);
  if (!table) return;
  check_shape(kOp, *table, "table", {h, kAny, kAny});
  check_real(kOp, query, *table, "table");
}

// A tensor [B, h, rows, C] with C side by side.
Rows<const void> rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The arguments of one call as the kernels take them, and the tensors that hold them.
struct Inputs {
  AttentionArgs args = {};
  ScalarType dtype;
  int64_t c;
  Tensor query, key, value, positions, grid_x, grid_y;
  std::optional<Tensor> key_t, table;

  Inputs(
      const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& positions_,
      const std::optional<Tensor>& table_, const std::vector<int64_t>& size, double scale, bool align_corners)
      : dtype(real_type(query_)),
        c(query_.size(3)),
        query(rows(query_)),
        key(rows(key_)),
        value(rows(value_)),
        positions(torch::stable::contiguous(positions_)) {
    args.is_double = dtype == ScalarType::Double;
    args.B = query.size(0), args.h = query.size(1), args.g = positions.size(1), args.H = size[0], args.W = size[1];
    args.N = key.size(2), args.C = query.size(3), args.scale = scale;
    args.query = rows_of(query), args.key = rows_of(key), args.value = rows_of(value);
    args.positions = positions.const_data_ptr();
    if (table_ && table_->numel() > 0) set_table(*table_, align_corners);
  }

  bool empty() const { return query.numel() == 0 || args.N == 0; }

  // Casts to the dtype of the sums and pads c to the multiple that kernels take; copies only where needed.
  Tensor rows(const Tensor& tensor) const {
    const int64_t missing = std::max<int64_t>((c + 15) / 16, 1) * 16 - c;
    Tensor wide = torch::stable::to(tensor, dtype);
    if (missing) wide = torch::stable::pad(wide, {0, missing});
    return wide.stride(3) == 1 ? wide : torch::stable::contiguous(wide);
  }

  // Each tile of queries in the forward reads all keys and values: side by side, and the keys transposed too.
  void gather_keys() {
    Tensor dense = torch::stable::contiguous(key);
    key_t = torch::stable::contiguous(torch::stable::transpose(dense, 2, 3)), args.key_t = key_t->const_data_ptr();
    value = torch::stable::contiguous(value), args.value = rows_of(value);
  }

 private:
  void set_table(const Tensor& given, bool align_corners) {
    args.T_h = given.size(1), args.T_w = given.size(2);
    table = torch::stable::contiguous(torch::stable::pad(given, {kMargin, kMargin, kRowMargin, kRowMargin}));
    args.table = table->const_data_ptr();
    args.unit_step = align_corners && args.T_w == 2 * args.W - 1;
    grid_x = torch::stable::new_empty(positions, {args.W + kRowPadding});
    grid_y = torch::stable::new_empty(positions, {args.H});
    args.is_double ? write_grids<double>(align_corners) : write_grids<float>(align_corners);
    args.grid_x = grid_x.const_data_ptr(), args.grid_y = grid_y.const_data_ptr();
  }

  template <typename Real>
  void write_grids(bool align_corners) {
    write_grid(static_cast<Real*>(grid_x.mutable_data_ptr()), args.W + kRowPadding, args.W, align_corners);
    write_grid(static_cast<Real*>(grid_y.mutable_data_ptr()), args.H, args.H, align_corners);
  }
};

int64_t count_tiles(const AttentionArgs& args) { return (args.H * args.W + kTile - 1) / kTile; }

// Zeros laid out in memory as `like`.
Tensor zeros(const Tensor& like) {
  Tensor tensor = torch::stable::empty_like(like);
  return torch::stable::zero_(tensor);
}

// A result [B, h, rows, c] that is laid out in memory as `like`. Kernels write it, where its rows are as they take them and
// there is one part, else [parts, B, h, rows, C], which is added up in a fixed order: nothing depends on which thread is
// first.
class Result {
 public:
  Result(const Inputs& inputs, const Tensor& like, int64_t parts = 1)
      : result_(torch::stable::empty_like(like)),
        direct_(parts == 1 && like.scalar_type() == inputs.dtype && inputs.c == inputs.args.C && result_.stride(3) == 1) {
    const AttentionArgs& args = inputs.args;
    const std::vector<int64_t> sizes = {parts, args.B, args.h, like.size(2), args.C};
    written_ = direct_ ? torch::stable::unsqueeze(result_, 0) : torch::stable::new_empty(like, sizes, inputs.dtype);
    part_bytes_ = written_.stride(0) * (args.is_double ? sizeof(double) : sizeof(float));
  }

  // Returns the output rows of one part.
  Rows<void> part(int64_t index) {
    char* start = static_cast<char*>(written_.mutable_data_ptr()) + index * part_bytes_;
    return {start, written_.stride(1), written_.stride(2), written_.stride(3)};
  }

  Tensor take() {
    if (direct_) return result_;
    const bool one = written_.size(0) == 1;
    Tensor total = one ? torch::stable::select(written_, 0, 0) : torch::stable::sum(written_, std::vector<int64_t>{0});
    return torch::stable::copy_(result_, torch::stable::narrow(total, 3, 0, result_.size(3)));
  }

 private:
  Tensor result_, written_;
  bool direct_;
  int64_t part_bytes_;
};

// Part `index` of the `parts` that the tiles of a head are shared out to.
AttentionPart make_part(const AttentionArgs& args, int64_t head, int64_t index, int64_t parts) {
  const int64_t tiles = count_tiles(args), queries = args.H * args.W;
  const auto begin = [&](int64_t i) { return std::min(queries, tiles * i / parts * kTile); };
  return {head / args.h, head % args.h, begin(index), begin(index + 1)};
}

std::tuple<Tensor, Tensor> forward(
    Tensor query, Tensor key, Tensor value, Tensor positions, std::optional<Tensor> table, std::vector<int64_t> size,
    double scale, bool align_corners) {
  check(query, key, value, positions, table, size);
  Inputs inputs(query, key, value, positions, table, size, scale, align_corners);
  const AttentionArgs& args = inputs.args;
  const std::vector<int64_t> layout = {args.B, args.h, args.H * args.W};
  if (inputs.empty()) {
    // Without keys the output is zero and the log-sum-exp that of an empty sum.
    const double none = -std::numeric_limits<double>::infinity();
    Tensor lse = torch::stable::new_empty(inputs.positions, layout);
    return {zeros(query), torch::stable::fill_(lse, none)};
  }
  inputs.gather_keys();
  Result out(inputs, query);
  Tensor lse = torch::stable::new_empty(inputs.query, layout);
  const int64_t tiles = count_tiles(args);
  // A thread is worth waking for some ten microseconds of work.
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / (kTile * args.N * args.C));
  torch::stable::parallel_for(0, args.B * args.h * tiles, grain, [&](int64_t begin, int64_t end) {
    const Bytes scratch = allocate(forward_scratch(args));
    for (int64_t t = begin; t < end; t++) {
      const AttentionPart part = make_part(args, t / tiles, t % tiles, tiles);
      kernels().attention.forward(args, part, out.part(0), lse.mutable_data_ptr(), scratch.get());
    }
  });
  return {out.take(), lse};
}

// Gradients, the sums among which parts of the work keep apart.
struct Sums {
  int64_t parts;
  Result grad_query, grad_key, grad_value;
  Tensor grad_positions, grad_table;

  Sums(const Inputs& inputs, const Tensor& query, const Tensor& key, const Tensor& value, int64_t parts)
      : parts(parts), grad_query(inputs, query), grad_key(inputs, key, parts), grad_value(inputs, value, parts) {
    const AttentionArgs& args = inputs.args;
    if (!inputs.table) return;
    grad_positions = torch::stable::new_zeros(inputs.key, {args.B, args.g, args.h / args.g, parts, args.N, 2});
    grad_table =
        torch::stable::new_zeros(inputs.key, {args.B, args.h, parts, args.T_h + 2 * kRowMargin, args.T_w + 2 * kMargin});
  }

  // Returns the gradients that part `unit` of [B, h, parts] writes.
  AttentionGrads of(const AttentionArgs& args, int64_t unit) {
    const int64_t bytes = args.is_double ? sizeof(double) : sizeof(float);
    const auto at = [&](Tensor& tensor, int64_t numbers) {
      return static_cast<char*>(tensor.mutable_data_ptr()) + unit * numbers * bytes;
    };
    AttentionGrads grads = {};
    grads.grad_query = grad_query.part(0), grads.grad_key = grad_key.part(unit % parts),
    grads.grad_value = grad_value.part(unit % parts);
    if (args.table) {
      grads.grad_positions = at(grad_positions, args.N * 2);
      grads.grad_table = at(grad_table, (args.T_h + 2 * kRowMargin) * (args.T_w + 2 * kMargin));
    }
    return grads;
  }

  Tensor positions() const { return torch::stable::sum(grad_positions, std::vector<int64_t>{2, 3}); }

  Tensor table(const AttentionArgs& args) {
    Tensor rows = torch::stable::narrow(grad_table, 3, kRowMargin, args.T_h);
    const Tensor inner = torch::stable::narrow(rows, 4, kMargin, args.T_w);
    return torch::stable::contiguous(torch::stable::sum(inner, std::vector<int64_t>{0, 2}));
  }
};

void run_backward(const Inputs& inputs, const Tensor& grad, const Tensor& out, const Tensor& lse, Sums& sums) {
  const AttentionArgs& args = inputs.args;
  const Tensor grads = inputs.rows(grad), outs = inputs.rows(out), lses = torch::stable::contiguous(lse);
  torch::stable::parallel_for(0, args.B * args.h * sums.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const AttentionPart part = make_part(args, unit / sums.parts, unit % sums.parts, sums.parts);
      AttentionGrads of = sums.of(args, unit);
      of.grad = rows_of(grads), of.out = rows_of(outs), of.lse = lses.const_data_ptr();
      const Bytes scratch = allocate(backward_scratch(args, part.query_end - part.query_begin));
      kernels().attention.backward(args, part, of, scratch.get());
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The CPU's sums are always taken in a fixed order.
Gradients backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, Tensor positions, std::optional<Tensor> table, Tensor out,
    Tensor lse, std::vector<int64_t> size, double scale, bool align_corners) {
  check(query, key, value, positions, table, size);
  check_shape(kOp, grad, "grad", {query.size(0), query.size(1), query.size(2), query.size(3)});
  check_shape(kOp, out, "out", {query.size(0), query.size(1), query.size(2), query.size(3)});
  check_shape(kOp, lse, "lse", {query.size(0), query.size(1), query.size(2)});
  check_dtype(kOp, grad, "grad", query, "query");
  check_dtype(kOp, out, "out", query, "query");
  check_real(kOp, query, lse, "lse");
  const Inputs inputs(query, key, value, positions, table, size, scale, align_corners);
  const AttentionArgs& args = inputs.args;
  const auto none = [](const Tensor& like) { return torch::stable::new_zeros(like, like.sizes()); };
  Tensor grad_positions = table ? none(positions) : torch::stable::new_empty(positions, {0});
  Tensor grad_table = table ? none(*table) : torch::stable::new_empty(positions, {0});
  if (inputs.empty()) return {zeros(query), zeros(key), zeros(value), grad_positions, grad_table};
  const int64_t heads = args.B * args.h, threads = torch::stable::get_num_threads();
  // Enough parts that no thread waits long for the last, where heads are few or do not come out even.
  const int64_t wanted = heads % threads ? (4 * threads + heads - 1) / heads : 1;
  Sums sums(inputs, query, key, value, std::min(wanted, count_tiles(args)));
  run_backward(inputs, grad, out, lse, sums);
  if (args.table) grad_positions = sums.positions(), grad_table = sums.table(args);
  return {sums.grad_query.take(), sums.grad_key.take(), sums.grad_value.take(), grad_positions, grad_table};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CPU, m) {
  m.impl("deform_attn", TORCH_BOX(&dat::forward));
  m.impl("deform_attn_backward", TORCH_BOX(&dat::backward));
}
