// Arguments that the CPU registration of deform_attn passes to its kernels for each instruction set.
#pragma once

#include <cstdint>

#include "../bilinear.h"

namespace dat {

// Queries and keys that are worked on together: their scores stay in the cache.
constexpr int64_t kTile = 64, kBlock = 64;

// Zeros around a table: `kMargin` columns left and right, `kRowMargin` rows above and below. Two of the widest registers
// that hang out on either side, and pixels one beyond the last.
constexpr int64_t kMargin = 36, kRowMargin = 2;

// Zeros on both sides of a row that the backward collects, and entries of `grid_x` beyond the last query.
constexpr int64_t kRowPadding = 32;

// Rows of C numbers side by side, [B, h, rows, C], and how many numbers further on the next image, head and row begin.
template <typename Void>
struct Rows {
  Void* at;
  int64_t image, head, row;
};

// Sizes and arrays of one call; all arrays are of float64 (`is_double`) or float32, and contiguous except for Rows.
struct AttentionArgs {
  bool is_double;
  // C is c filled up with zeros to a multiple of 16.
  int64_t B, h, g, H, W, N, C;
  double scale;
  // H*W rows of each head, and N.
  Rows<const void> query, key, value;
  // Forward: `key` transposed, [B, h, C, N].
  const void* key_t;
  // [B, g, N, 2] and [h, T_h + 2 kRowMargin, T_w + 2 kMargin]; without a table there is no bias.
  const void *positions, *table;
  int64_t T_h, T_w;
  // Coordinates of the queries, -1..1: [W + kRowPadding] and [H].
  const void *grid_x, *grid_y;
  // Whether neighbouring queries look up neighbouring columns: the interpolation's fraction then belongs to the key.
  bool unit_step;
};

// Some queries of one head; `query_begin` is a multiple of kTile.
struct AttentionPart {
  int64_t image, head, query_begin, query_end;
};

// Further inputs of backward, `lse` [B, h, H*W], and where one part writes: rows of its queries, and sums of its own over
// its queries, N rows, [N, 2] and the layout of one head's table.
// grad_positions and grad_table are added to, and null without a table.
struct AttentionGrads {
  Rows<const void> grad, out;
  const void* lse;
  Rows<void> grad_query, grad_key, grad_value;
  void *grad_positions, *grad_table;
};

struct AttentionKernels {
  // Writes rows of queries and the logarithm of each query's sum of exponentials, [B, h, H*W].
  void (*forward)(const AttentionArgs& args, const AttentionPart& part, const Rows<void>& out, void* lse, void* scratch);
  void (*backward)(const AttentionArgs& args, const AttentionPart& part, const AttentionGrads& grads, void* scratch);
};

// Bytes of scratch memory, aligned to registers.
inline int64_t forward_scratch(const AttentionArgs& args) {
  return static_cast<int64_t>(sizeof(double)) * (kBlock * (kTile + 16) + 2 * args.C * kTile + 16 * (kBlock + kTile));
}
inline int64_t backward_scratch(const AttentionArgs& args, int64_t queries) {
  const int64_t tiles = (queries + kTile - 1) / kTile;
  return static_cast<int64_t>(args.is_double ? sizeof(double) : sizeof(float)) *
         (2 * kBlock * (kTile + 16) + tiles * kTile * (5 * args.C + 2) + 5 * kBlock * args.C + 32 * (kBlock + kTile) +
          2 * kBlock * (args.W + 2 * kRowPadding));
}

}  // namespace dat
