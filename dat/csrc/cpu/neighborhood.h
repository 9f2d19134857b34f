// What the CPU registration of neighborhood_attn and its kernels for each instruction set have in common.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace dat {

// A tensor [B, heads, H * W, C] whose channels lie side by side; steps in numbers.
struct HeadCells {
  const void* data;
  int64_t image, head, cell;
};

// `Real` is the dtype of the sums: float64 for float64 values, else float32.
struct NeighborhoodArgs {
  ValueType type;
  int64_t B, heads, H, W, C, kernel, dilation;
  double scale;
  HeadCells query, key, value;
  // [heads, 2 * kernel - 1, 2 * kernel - 1] in Real, or null.
  const void* bias;
};

// Some rows of queries of one head, in the map of `rows` x `columns` that the cells of the same remainders by the dilation
// are: cell (i, j) of it is cell (first_row + i * dilation, first_column + j * dilation) of the whole. No part has more than
// `most_rows` rows of queries, which the scratch memory is laid out for.
struct NeighborhoodPart {
  int64_t image, head, first_row, first_column, rows, columns, row_begin, row_end, most_rows;
};

// The first of the neighbours of `index` along a side: the window is moved inwards at the borders.
// Inlined, as a function compiled for one instruction set must not run on another.
DAT_HOST_DEVICE int64_t window_start(int64_t index, int64_t length, int64_t kernel) {
  const int64_t start = index < kernel / 2 ? 0 : index - kernel / 2;
  return start < length - kernel ? start : length - kernel;
}

// Where a part leaves its gradients. by_query is [B, H * W, heads, C] in the dtype of the query; the others are sums over
// this part alone, in Real: by_key and by_value [window rows of the part, columns, C], by_bias of the shape of a head's
// bias.
struct NeighborhoodGrads {
  HeadCells out;
  void* by_query;
  void *by_key, *by_value, *by_bias;
};

struct NeighborhoodKernels {
  // Bytes of scratch memory for parts of at most `most_rows` rows. It must be zero before the first part, and before one
  // that has other columns than the one before.
  int64_t (*scratch_bytes)(const NeighborhoodArgs& args, int64_t most_rows, bool with_backward);
  // Writes the rows of the parts to `out` [B, H * W, heads, C].
  void (*forward)(const NeighborhoodArgs& args, const NeighborhoodPart& part, void* out, void* scratch);
  void (*backward)(
      const NeighborhoodArgs& args, const NeighborhoodPart& part, const NeighborhoodGrads& grads, void* scratch);
  // Writes sums over `copies` arrays of `cells` x C numbers in Real to cells that are `step` numbers apart.
  void (*write_cells)(
      const NeighborhoodArgs& args, const void* const* sums, int64_t copies, int64_t cells, void* to, int64_t step);
};

const NeighborhoodKernels& neighborhood_baseline();
#if defined(__x86_64__)
const NeighborhoodKernels& neighborhood_avx2();
const NeighborhoodKernels& neighborhood_avx512();
#endif

// Run the kernels in parallel; results do not depend on the number of threads. Gradients of query, key and value are
// [B, H * W, heads, C] in their dtype; by_bias is in Real, or null.
void neighborhood_forward(const NeighborhoodArgs& args, void* out);
void neighborhood_backward(
    const NeighborhoodArgs& args, const HeadCells& out, void* by_query, void* by_key, void* by_value, void* by_bias);

}  // namespace dat
