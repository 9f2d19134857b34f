// Divides the work of neighborhood_attn among threads, in bands of rows.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace dat {
namespace {

int64_t value_bytes(const NeighborhoodArgs& args) {
  switch (args.type) {
    case ValueType::kFloat64: return 8;
    case ValueType::kFloat32: return 4;
    default: return 2;
  }
}

int64_t real_bytes(const NeighborhoodArgs& args) { return args.type == ValueType::kFloat64 ? 8 : 4; }

// Every head's map, or maps by the remainders of a dilation, in bands of about as many rows. Bands do not depend on the
// number of threads, so that sums are always taken in the same order.
struct Work {
  const NeighborhoodArgs& args;
  const int64_t bands, band_rows, window_rows, max_columns;
  std::vector<NeighborhoodPart> parts;

  explicit Work(const NeighborhoodArgs& args)
      : args(args),
        bands(count_bands(longest(args.H))),
        band_rows((longest(args.H) + bands - 1) / bands),
        window_rows(band_rows + args.kernel - 1),
        max_columns(longest(args.W)) {
    for (int64_t image = 0; image < args.B; image++)
      for (int64_t head = 0; head < args.heads; head++)
        for (int64_t y = 0; y < args.dilation; y++)
          for (int64_t x = 0; x < args.dilation; x++) add_bands(image, head, y, x);
  }

  // Numbers of the sums over a part by key, or by value.
  int64_t window_size() const { return window_rows * max_columns * args.C; }

  // The first of the parts of a head; those of each remainder of rows and columns follow each other, `bands` of each.
  int64_t first_part(int64_t image, int64_t head) const {
    return (image * args.heads + head) * args.dilation * args.dilation * bands;
  }

  // Runs `function(index of part, scratch)` for every part.
  template <typename F>
  void run(bool with_backward, F function) const {
    const int64_t bytes = kernels().neighborhood.scratch_bytes(args, band_rows, with_backward);
    torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
      const Bytes scratch = allocate(bytes);
      for (int64_t p = begin; p < end; p++) {
        if (p == begin || parts[p].columns != parts[p - 1].columns) std::memset(scratch.get(), 0, bytes);
        function(p, scratch.get());
      }
    });
  }

 private:
  int64_t longest(int64_t length) const { return (length + args.dilation - 1) / args.dilation; }

  // A band loads kernel - 1 rows of its neighbours too, so it is to have at least twice as many of its own.
  int64_t count_bands(int64_t rows) const { return std::max<int64_t>(1, rows / std::max<int64_t>(14, 2 * args.kernel)); }

  void add_bands(int64_t image, int64_t head, int64_t y, int64_t x) {
    const int64_t rows = (args.H - y + args.dilation - 1) / args.dilation;
    const int64_t columns = (args.W - x + args.dilation - 1) / args.dilation;
    for (int64_t band = 0; band < bands; band++)
      parts.push_back({image, head, y, x, rows, columns, rows * band / bands, rows * (band + 1) / bands, band_rows});
  }
};

// Sums the parts' gradients with respect to the keys (or values), always in the same order.
void add_windows(const Work& work, const char* sums, void* to) {
  const NeighborhoodArgs& args = work.args;
  const int64_t pixel = args.heads * args.C, real = real_bytes(args), bytes = value_bytes(args);
  torch::stable::parallel_for(0, args.B * args.heads * args.H, 1, [&](int64_t begin, int64_t end) {
    std::vector<const void*> rows;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t y = unit % args.H, head = unit / args.H % args.heads, image = unit / args.H / args.heads;
      const int64_t row = y / args.dilation;
      for (int64_t x = 0; x < args.dilation; x++) {
        const int64_t first = work.first_part(image, head) + (y % args.dilation * args.dilation + x) * work.bands;
        rows.clear();
        for (int64_t p = first; p < first + work.bands; p++) {
          const NeighborhoodPart& part = work.parts[p];
          const int64_t window_begin = window_start(part.row_begin, part.rows, args.kernel);
          const int64_t window_end = window_start(part.row_end - 1, part.rows, args.kernel) + args.kernel;
          if (window_begin <= row && row < window_end)
            rows.push_back(sums + (p * work.window_size() + (row - window_begin) * part.columns * args.C) * real);
        }
        const int64_t place = ((image * args.H + y) * args.W + x) * pixel + head * args.C;
        kernels().neighborhood.write_pixels(
            args, rows.data(), rows.size(), work.parts[first].columns, static_cast<char*>(to) + place * bytes,
            pixel * args.dilation);
      }
    }
  });
}

template <typename Real>
void add_biases(const Work& work, const Real* sums, Real* to) {
  const NeighborhoodArgs& args = work.args;
  const int64_t side = 2 * args.kernel - 1, size = side * side;
  std::fill_n(to, args.heads * size, Real(0));
  for (size_t p = 0; p < work.parts.size(); p++) {
    for (int64_t k = 0; k < size; k++) to[work.parts[p].head * size + k] += sums[p * size + k];
  }
}

}  // namespace

void neighborhood_forward(const NeighborhoodArgs& args, void* out) {
  const Work work(args);
  work.run(false, [&](int64_t p, char* scratch) { kernels().neighborhood.forward(args, work.parts[p], out, scratch); });
}

void neighborhood_backward(
    const NeighborhoodArgs& args, const HeadPixels& out, void* grad_query, void* grad_key, void* grad_value,
    void* grad_bias) {
  const Work work(args);
  const int64_t count = work.parts.size(), side = 2 * args.kernel - 1;
  const int64_t window_bytes = work.window_size() * real_bytes(args), bias_bytes = side * side * real_bytes(args);
  const Bytes keys = allocate(count * window_bytes), values = allocate(count * window_bytes);
  const Bytes biases = allocate(count * bias_bytes);
  work.run(true, [&](int64_t p, char* scratch) {
    NeighborhoodGrads grads = {out, grad_query};
    grads.grad_key = keys.get() + p * window_bytes, grads.grad_value = values.get() + p * window_bytes;
    grads.grad_bias = biases.get() + p * bias_bytes;
    kernels().neighborhood.backward(args, work.parts[p], grads, scratch);
  });
  add_windows(work, keys.get(), grad_key);
  add_windows(work, values.get(), grad_value);
  if (!grad_bias) return;
  if (args.type == ValueType::kFloat64)
    add_biases(work, reinterpret_cast<const double*>(biases.get()), static_cast<double*>(grad_bias));
  else
    add_biases(work, reinterpret_cast<const float*>(biases.get()), static_cast<float*>(grad_bias));
}

}  // namespace dat
