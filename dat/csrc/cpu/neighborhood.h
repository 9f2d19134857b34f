// Arguments that the CPU registration of neighborhood_attn passes to its kernels for each instruction set.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace dat {

// A tensor [B, heads, H * W, C] whose channels lie side by side; steps in numbers.
struct HeadPixels {
  const void* data;
  int64_t image, head, pixel;
};

// `Real` is the dtype of the sums: float64 for float64 values, else float32.
struct NeighborhoodArgs {
  ValueType type;
  int64_t B, heads, H, W, C, kernel, dilation;
  double scale;
  HeadPixels query, key, value;
  // [heads, 2 * kernel - 1, 2 * kernel - 1] in Real, or null.
  const void* bias;
};

// Some rows of queries of one head, in the map of `rows` x `columns` that the pixels of the same remainders by the dilation
// are: pixel (i, j) of it is pixel (first_row + i * dilation, first_column + j * dilation) of the whole. No part has more
// than `most_rows` rows of queries, which the scratch memory is laid out for.
struct NeighborhoodPart {
  int64_t image, head, first_row, first_column, rows, columns, row_begin, row_end, most_rows;
};

// The first of the neighbours of `index` along a side: the window is moved inwards at the borders.
// Inlined, as a function compiled for one instruction set must not run on another.
DAT_HOST_DEVICE int64_t window_start(int64_t index, int64_t length, int64_t kernel) {
  const int64_t start = index < kernel / 2 ? 0 : index - kernel / 2;
  return start < length - kernel ? start : length - kernel;
}

// Outputs of a part's backward. grad_query is [B, H * W, heads, C] in the dtype of the query; the others are sums over
// this part only, in Real: grad_key and grad_value [window rows of the part, columns, C], grad_bias of the shape of a
// head's bias.
struct NeighborhoodGrads {
  HeadPixels out;
  void* grad_query;
  void *grad_key, *grad_value, *grad_bias;
};

struct NeighborhoodKernels {
  // Bytes of scratch memory for parts of at most `most_rows` rows. It must be zero before the first part, and before one
  // that has other columns than the one before.
  int64_t (*scratch_bytes)(const NeighborhoodArgs& args, int64_t most_rows, bool with_backward);
  // Writes the rows of the parts to `out` [B, H * W, heads, C].
  void (*forward)(const NeighborhoodArgs& args, const NeighborhoodPart& part, void* out, void* scratch);
  void (*backward)(
      const NeighborhoodArgs& args, const NeighborhoodPart& part, const NeighborhoodGrads& grads, void* scratch);
  // Writes sums over `copies` arrays of `pixels` x C numbers in Real to pixels that are `step` numbers apart.
  void (*write_pixels)(
      const NeighborhoodArgs& args, const void* const* sums, int64_t copies, int64_t pixels, void* to, int64_t step);
};

// Run the kernels in parallel; results do not depend on the number of threads. Gradients of query, key and value are
// [B, H * W, heads, C] in their dtype; grad_bias is in Real, or null.
void neighborhood_forward(const NeighborhoodArgs& args, void* out);
void neighborhood_backward(
    const NeighborhoodArgs& args, const HeadPixels& out, void* grad_query, void* grad_key, void* grad_value,
    void* grad_bias);

}  // namespace dat
