// The kernels of deform_attn, compiled once for each instruction set: see vector.h. No standard library here.
//
// Scores of a block of keys and a tile of queries, a row for each key, never leave the cache. Softmax needs no sums across
// lanes that way, and the bias of neighbouring queries lies side by side in its table.
#pragma once

#include "attention.h"
#include "attention_bias.h"
#include "vector.h"

namespace dat {
namespace DAT_ISA {
namespace attention {

// Sums that a matrix product keeps in registers: kRows rows of two.
constexpr int kRows = DAT_VECTOR_BYTES == 64 ? 8 : 4;

// A matrix product's left side, number (row r, column k): at `row_step` r + k or, transposed, at r + `step` k.
template <typename Real, bool kTransposed>
struct Left {
  const Real* at;
  int64_t step;
  DAT_HOST_DEVICE Real number(int64_t r, int64_t k) const { return kTransposed ? at[r + step * k] : at[kStride * r + k]; }
  DAT_HOST_DEVICE Left below(int64_t rows) const { return {at + (kTransposed ? rows : kStride * rows), step}; }
};

// Adds R rows of V registers to `sums`: left [R, K] times right [K, V * N].
template <typename Real, bool kTransposed, int R, int V>
DAT_HOST_DEVICE void add_product(
    Left<Real, kTransposed> left, const Real* right, int64_t stride, int64_t K, Real* sums, int64_t to) {
  constexpr int N = kLanes<Real>;
  Vec<Real, N> sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = load(sums + r * to + v * N);
  for (int64_t k = 0; k < K; k++, right += stride) {
    Vec<Real, N> factor[V];
    for (int v = 0; v < V; v++) factor[v] = load(right + v * N);
    for (int r = 0; r < R; r++) {
      const Real number = left.number(r, k);
      for (int v = 0; v < V; v++) sum[r][v] += number * factor[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(sums + r * to + v * N, sum[r][v]);
}

template <typename Real, bool kTransposed, int R, int V>
DAT_HOST_DEVICE void add_rows(
    Left<Real, kTransposed> left, int64_t rows, const Real* right, int64_t stride, int64_t K, Real* sums, int64_t to) {
  for (; rows >= R; rows -= R, left = left.below(R), sums += R * to)
    add_product<Real, kTransposed, R, V>(left, right, stride, K, sums, to);
  if constexpr (R > 1) {
    if (rows > 0) add_rows<Real, kTransposed, R / 2, V>(left, rows, right, stride, K, sums, to);
  }
}

// sums [rows, columns] += left [rows, K] right [K, columns]; columns is a multiple of a register's.
template <typename Real, bool kTransposed>
void multiply(
    Left<Real, kTransposed> left, int64_t rows, int64_t K, const Real* right, int64_t stride, int64_t columns, Real* sums,
    int64_t to) {
  constexpr int N = kLanes<Real>;
  int64_t j = 0;
  for (; j + 2 * N <= columns; j += 2 * N)
    add_rows<Real, kTransposed, kRows, 2>(left, rows, right + j, stride, K, sums + j, to);
  for (; j < columns; j += N) add_rows<Real, kTransposed, kRows, 1>(left, rows, right + j, stride, K, sums + j, to);
}

// Interleaving a square's rows with those half a square below, as often as its side can be halved, transposes it.
template <int kStep, typename Real, int N>
DAT_HOST_DEVICE void interleave(Numbers<Real, N> (&rows)[N]) {
  Numbers<Real, N> next[N];
  for (int i = 0; i < N / 2; i++) {
    next[2 * i] = {zip<0>(rows[i], rows[i + N / 2], Indices<N>())};
    next[2 * i + 1] = {zip<N / 2>(rows[i], rows[i + N / 2], Indices<N>())};
  }
  for (int i = 0; i < N; i++) rows[i] = next[i];
  if constexpr (kStep > 2) interleave<kStep / 2>(rows);
}

// Writes `count` rows of C numbers, times `scale`, as columns: [C, kTile], zero beyond the last.
template <typename Real>
void transpose(const Real* from, int64_t row, int64_t count, int64_t C, Real scale, Real* to) {
  constexpr int N = kLanes<Real>;
  for (int64_t q = 0; q < kTile; q += N) {
    for (int64_t c = 0; c < C; c += N) {
      Numbers<Real, N> rows[N];
      for (int i = 0; i < N; i++) rows[i].v = q + i < count ? load(from + (q + i) * row + c) * scale : Vec<Real, N>{};
      interleave<N>(rows);
      for (int i = 0; i < N; i++) store(to + (c + i) * kTile + q, rows[i].v);
    }
  }
}

// Writes `count` rows of C numbers, times `scale`.
template <typename Real>
void copy(const Real* from, int64_t row, int64_t count, int64_t C, Real scale, Real* to, int64_t to_row) {
  for (int64_t i = 0; i < count; i++) {
    for (int64_t c = 0; c < C; c += kLanes<Real>) store(to + i * to_row + c, load(from + i * row + c) * scale);
  }
}

// The rows of one head, from `row` on.
template <typename Real>
const Real* rows_of(const Rows<const void>& rows, const AttentionPart& part, int64_t row) {
  return static_cast<const Real*>(rows.at) + part.image * rows.image + part.head * rows.head + row * rows.row;
}
template <typename Real>
Real* rows_of(const Rows<void>& rows, const AttentionPart& part, int64_t row) {
  return static_cast<Real*>(rows.at) + part.image * rows.image + part.head * rows.head + row * rows.row;
}

template <typename Real>
DAT_HOST_DEVICE int64_t whole_registers(int64_t count) {
  return (count + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

template <typename Real>
DAT_HOST_DEVICE void clear(Real* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i++) numbers[i] = 0;
}

template <typename Real>
DAT_HOST_DEVICE void scale_all(Real* numbers, int64_t count, Real factor) {
  for (int64_t i = 0; i < count; i++) numbers[i] *= factor;
}

// Arrays one after the other in scratch memory, each aligned to cache lines.
template <typename Real>
class Arena {
 public:
  explicit Arena(void* memory) : free_(static_cast<Real*>(memory)) {}
  DAT_HOST_DEVICE Real* take(int64_t numbers) {
    Real* taken = free_;
    free_ += (numbers + 15) / 16 * 16;
    return taken;
  }

 private:
  Real* free_;
};

// Scores and their softmax for one tile of queries after the other.
template <typename Real>
class Forward {
 public:
  static constexpr int N = kLanes<Real>;
  using V = Vec<Real, N>;

  Forward(const AttentionArgs& args, const AttentionPart& part, void* scratch)
      : args_(args), part_(part), head_(part.image * args.h + part.head), bias_(args, part) {
    Arena<Real> arena(scratch);
    scores_ = arena.take(kBlock * kStride), query_ = arena.take(args.C * kTile), sums_ = arena.take(args.C * kTile);
    top_ = arena.take(kTile), total_ = arena.take(kTile), shrink_ = arena.take(kTile);
    clear(scores_, kBlock * kStride);
  }

  // Queries first .. first + count.
  void run(int64_t first, int64_t count, const Rows<void>& out, Real* lse) {
    const Real* query = rows_of<Real>(args_.query, part_, first);
    transpose(query, args_.query.row, count, args_.C, Real(args_.scale), query_);
    clear(sums_, count * args_.C);
    for (int64_t q = 0; q < kTile; q++) top_[q] = -__builtin_huge_val(), total_[q] = 0;
    for (int64_t n = 0; n < args_.N; n += kBlock) add_keys(n, args_.N - n < kBlock ? args_.N - n : kBlock, first, count);
    for (int64_t q = 0; q < count; q++) {
      copy(sums_ + q * args_.C, args_.C, 1, args_.C, 1 / total_[q], rows_of<Real>(out, part_, first + q), out.row);
      lse[head_ * args_.H * args_.W + first + q] = top_[q] + __builtin_log(total_[q]);
    }
  }

 private:
  const AttentionArgs& args_;
  const AttentionPart& part_;
  const int64_t head_;
  Bias<Real> bias_;
  Real *scores_, *query_, *sums_;
  // For each query: the largest score so far, the sum of exponentials, and the factor for earlier blocks' sums.
  Real *top_, *total_, *shrink_;

  void add_keys(int64_t n, int64_t keys, int64_t first, int64_t count) {
    if (args_.table) {
      bias_.take(n, keys);
      bias_.fill(scores_, first, count);
    } else {
      clear(scores_, keys * kStride);
    }
    const Real* key_t = static_cast<const Real*>(args_.key_t) + head_ * args_.N * args_.C + n;
    multiply<Real, true>({key_t, args_.N}, keys, args_.C, query_, kTile, whole_registers<Real>(count), scores_, kStride);
    for (int64_t q = 0; q < count; q += N) exponentials(q, keys);
    if (n > 0) {
      for (int64_t q = 0; q < count; q++) scale_all(sums_ + q * args_.C, args_.C, shrink_[q]);
    }
    const Real* value = rows_of<Real>(args_.value, part_, n);
    multiply<Real, true>({scores_, kStride}, count, keys, value, args_.value.row, args_.C, sums_, args_.C);
  }

  DAT_HOST_DEVICE void exponentials(int64_t q, int64_t keys) {
    V top = load(top_ + q);
    for (int64_t n = 0; n < keys; n++) {
      const V score = load(scores_ + n * kStride + q);
      top = score > top ? score : top;
    }
    // Where all scores so far are minus infinity, less zero they are still without attention.
    const V base = top == -Real(__builtin_huge_val()) ? V{} : top;
    const V shrink = Exp<Real, N>::of(load(top_ + q) - base);
    V total = load(total_ + q) * shrink;
    for (int64_t n = 0; n < keys; n++) {
      const V e = Exp<Real, N>::of(load(scores_ + n * kStride + q) - base);
      store(scores_ + n * kStride + q, e);
      total += e;
    }
    store(top_ + q, top), store(total_ + q, total), store(shrink_ + q, shrink);
  }
};

template <typename Real>
void forward(const AttentionArgs& args, const AttentionPart& part, const Rows<void>& out, void* lse, void* scratch) {
  Forward<Real> tile(args, part, scratch);
  for (int64_t q = part.query_begin; q < part.query_end; q += kTile) {
    const int64_t count = part.query_end - q < kTile ? part.query_end - q : kTile;
    tile.run(q, count, out, static_cast<Real*>(lse));
  }
}

// Loops over blocks of keys, each with all queries of the part. Strided rows are first copied to contiguous memory.
template <typename Real>
class Backward {
 public:
  static constexpr int N = kLanes<Real>;
  using V = Vec<Real, N>;

  Backward(const AttentionArgs& args, const AttentionPart& part, const AttentionGrads& grads, void* scratch)
      : args_(args), part_(part), grads_(grads), queries_(part.query_end - part.query_begin), bias_(args, part) {
    Arena<Real> arena(scratch);
    attention_ = arena.take(kBlock * kStride), grad_scores_ = arena.take(kBlock * kStride);
    const int64_t rows = (queries_ + kTile - 1) / kTile * kTile, C = args.C;
    query_ = arena.take(rows * C), grad_ = arena.take(rows * C), grad_query_ = arena.take(rows * C);
    query_t_ = arena.take(rows * C), grad_t_ = arena.take(rows * C);
    lse_ = arena.take(rows), dots_ = arena.take(rows);
    key_ = arena.take(kBlock * C), key_t_ = arena.take(kBlock * C), value_t_ = arena.take(kBlock * C);
    grad_key_ = arena.take(kBlock * C), grad_value_ = arena.take(kBlock * C);
    rows_ = arena.take(2 * kBlock * bias_.row_size());
    clear(attention_, kBlock * kStride);
    for (int64_t q = 0; q < queries_; q += kTile) prepare(q);
  }

  void run() {
    const int64_t C = args_.C;
    clear(grad_query_, queries_ * C);
    for (int64_t n = 0; n < args_.N; n += kBlock) {
      keys_ = args_.N - n < kBlock ? args_.N - n : kBlock;
      take_keys(n);
      if (args_.table) {
        bias_.take(n, keys_);
        bias_.begin_gradients(rows_, static_cast<Real*>(grads_.grad_table), static_cast<Real*>(grads_.grad_positions));
      }
      for (int64_t q = 0; q < queries_; q += kTile) add_tile(q);
      if (args_.table) bias_.end_gradients();
      copy(grad_key_, C, keys_, C, Real(args_.scale), rows_of<Real>(grads_.grad_key, part_, n), grads_.grad_key.row);
      copy(grad_value_, C, keys_, C, Real(1), rows_of<Real>(grads_.grad_value, part_, n), grads_.grad_value.row);
    }
    Real* grad_query = rows_of<Real>(grads_.grad_query, part_, part_.query_begin);
    copy(grad_query_, C, queries_, C, Real(args_.scale), grad_query, grads_.grad_query.row);
  }

 private:
  const AttentionArgs& args_;
  const AttentionPart& part_;
  const AttentionGrads& grads_;
  const int64_t queries_;
  Bias<Real> bias_;
  int64_t keys_ = 0;
  Real *attention_, *grad_scores_;
  // Rows of all queries of the part; transposed tile by tile, [C, kTile].
  Real *query_, *grad_, *grad_query_, *query_t_, *grad_t_;
  // For each query: its log-sum-exp and the product of the output with its gradient.
  Real *lse_, *dots_;
  // Rows of a block of keys; transposed, [C, kBlock].
  Real *key_, *key_t_, *value_t_, *grad_key_, *grad_value_, *rows_;

  DAT_HOST_DEVICE int64_t count(int64_t q) const { return queries_ - q < kTile ? queries_ - q : kTile; }

  // Queries from the part's number `q` on, a tile of them.
  void prepare(int64_t q) {
    const int64_t C = args_.C, row = part_.query_begin + q;
    const Real *query = rows_of<Real>(args_.query, part_, row), *grad = rows_of<Real>(grads_.grad, part_, row);
    copy(query, args_.query.row, count(q), C, Real(1), query_ + q * C, C);
    copy(grad, grads_.grad.row, count(q), C, Real(1), grad_ + q * C, C);
    transpose(query_ + q * C, C, count(q), C, Real(args_.scale), query_t_ + q * C);
    transpose(grad_ + q * C, C, count(q), C, Real(1), grad_t_ + q * C);
    const Real* out = rows_of<Real>(grads_.out, part_, row);
    const Real* lse = static_cast<const Real*>(grads_.lse) + (part_.image * args_.h + part_.head) * args_.H * args_.W + row;
    for (int64_t i = 0; i < kTile; i++) {
      V dot = {};
      for (int64_t c = 0; i < count(q) && c < C; c += N)
        dot += load(out + i * grads_.out.row + c) * load(grad_ + (q + i) * C + c);
      lse_[q + i] = i < count(q) ? lse[i] : 0, dots_[q + i] = Sum<Real, N>::of(dot);
    }
  }

  void take_keys(int64_t n) {
    const int64_t C = args_.C;
    const Real *key = rows_of<Real>(args_.key, part_, n), *value = rows_of<Real>(args_.value, part_, n);
    copy(key, args_.key.row, keys_, C, Real(1), key_, C);
    transpose(key_, C, keys_, C, Real(1), key_t_);
    transpose(value, args_.value.row, keys_, C, Real(1), value_t_);
    clear(grad_key_, keys_ * C), clear(grad_value_, keys_ * C);
  }

  void add_tile(int64_t q) {
    const int64_t C = args_.C, first = part_.query_begin + q;
    if (args_.table) {
      bias_.fill(attention_, first, count(q));
    } else {
      clear(attention_, keys_ * kStride);
    }
    const int64_t width = whole_registers<Real>(count(q));
    multiply<Real, true>({key_t_, kBlock}, keys_, C, query_t_ + q * C, kTile, width, attention_, kStride);
    clear(grad_scores_, keys_ * kStride);
    multiply<Real, true>({value_t_, kBlock}, keys_, C, grad_t_ + q * C, kTile, width, grad_scores_, kStride);
    for (int64_t i = 0; i < width; i += N) differentiate(i, load(lse_ + q + i), load(dots_ + q + i));
    multiply<Real, false>({attention_, 1}, keys_, count(q), grad_ + q * C, C, C, grad_value_, C);
    multiply<Real, false>({grad_scores_, 1}, keys_, count(q), query_ + q * C, C, C, grad_key_, C);
    multiply<Real, true>({grad_scores_, kStride}, count(q), keys_, key_, C, C, grad_query_ + q * C, C);
    if (args_.table) bias_.add_gradients(grad_scores_, first, count(q));
  }

  // Scores to attention, and its gradients to those of the scores.
  DAT_HOST_DEVICE void differentiate(int64_t i, V lse, V dot) {
    for (int64_t n = 0; n < keys_; n++) {
      Real *attention = attention_ + n * kStride + i, *grad_score = grad_scores_ + n * kStride + i;
      const V p = Exp<Real, N>::of(load(attention) - lse);
      store(attention, p);
      store(grad_score, p * (load(grad_score) - dot));
    }
  }
};

template <typename Real>
void backward(const AttentionArgs& args, const AttentionPart& part, const AttentionGrads& grads, void* scratch) {
  Backward<Real>(args, part, grads, scratch).run();
}

inline void forward_any(
    const AttentionArgs& args, const AttentionPart& part, const Rows<void>& out, void* lse, void* scratch) {
  args.is_double ? forward<double>(args, part, out, lse, scratch) : forward<float>(args, part, out, lse, scratch);
}

inline void backward_any(const AttentionArgs& args, const AttentionPart& part, const AttentionGrads& grads, void* scratch) {
  args.is_double ? backward<double>(args, part, grads, scratch) : backward<float>(args, part, grads, scratch);
}

constexpr AttentionKernels kKernels = {forward_any, backward_any};

}  // namespace attention
}  // namespace DAT_ISA
}  // namespace dat
