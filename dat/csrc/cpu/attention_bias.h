// Look-up of the continuous position bias in its table, and its gradients: for attention_kernels.h.
#pragma once

#include "attention.h"
#include "vector.h"

namespace dat {
namespace DAT_ISA {
namespace attention {

// Numbers between one key's row of scores and the next: a tile, and room for a register that hangs out.
constexpr int64_t kStride = kTile + 16;

// Columns that a register of neighbouring queries looks up: `index` and `index + 1` from column `first` on.
template <typename Real>
struct Columns {
  int64_t first;
  typename Lanes<Real>::Int index;
  typename Lanes<Real>::Real fraction;
};

// Bias of all queries for a block of keys of one head. The part common to all queries of a column is computed per key and
// row of the map, so that only columns are left to interpolate for each pair.
template <typename Real>
class Bias {
 public:
  using V = typename Lanes<Real>::Real;
  using I = typename Lanes<Real>::Int;
  using Int = IntOf<Real>;
  static constexpr int N = kLanes<Real>;

  Bias(const AttentionArgs& args, const AttentionPart& part)
      : args_(args),
        grid_x_(static_cast<const Real*>(args.grid_x)),
        grid_y_(static_cast<const Real*>(args.grid_y)),
        stride_(args.T_w + 2 * kMargin),
        first_pixel_(kRowMargin * stride_ + kMargin),
        table_(static_cast<const Real*>(args.table) + part.head * (args.T_h + 2 * kRowMargin) * stride_ + first_pixel_),
        positions_(
            static_cast<const Real*>(args.positions) + 2 * (part.image * args.g + part.head / (args.h / args.g)) * args.N) {
    if (!args.table) return;
    // Columns that two registers hold can be picked from them; the wider the table, the further apart they are.
    const Real step = args.W > 1 ? (grid_x_[1] - grid_x_[0]) / 4 * (args.T_w - 1) : Real(args.T_w);
    narrow_ = step * (N - 1) <= 2 * N - 3;
  }

  // Numbers of a row that the gradients are collected in.
  DAT_HOST_DEVICE int64_t row_size() const { return args_.W + 2 * kRowPadding; }

  // Turns to keys first .. first + count.
  void take(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    for (int64_t n = 0; n < kBlock; n++) {
      x_[n] = n < count ? clamp(positions_[2 * (first + n)]) : 0;
      y_[n] = n < count ? clamp(positions_[2 * (first + n) + 1]) : 0;
      const double column = (args_.W - 1) - (double(x_[n]) + 1) * 0.5 * (args_.W - 1);
      const int64_t whole = floor(column);
      start_[n] = whole, fraction_[n] = column - whole;
    }
  }

  // Writes the bias of queries first .. first + count, a row of `scores` for each key; the rest of a row is overwritten too.
  void fill(Real* scores, int64_t first, int64_t count) {
    args_.unit_step ? fill_rows<true>(scores, first, count) : fill_rows<false>(scores, first, count);
  }

  // Begins to collect the gradients of the keys in `rows`, two of row_size() for each key.
  void begin_gradients(Real* rows, Real* grad_table, Real* grad_positions) {
    rows_ = rows, grad_table_ = grad_table + first_pixel_, grad_positions_ = grad_positions + 2 * first_;
    for (int64_t i = 0; i < 2 * count_ * row_size(); i++) rows[i] = 0;
    for (int64_t n = 0; n < count_; n++) open_[n] = -1 - kRowMargin;
  }

  // Adds `grads`, the scores' gradients of queries first .. first + count. A key's queries that look up the same two rows of
  // the table are added up before they are spread over its columns.
  void add_gradients(const Real* grads, int64_t first, int64_t count) {
    for (Segment s = segment(first, count, 0); s.length > 0; s = segment(first, count, s.end())) {
      look_up_rows(s.row);
      for (int64_t n = 0; n < count_; n++) {
        if (open_[n] != row_[n]) close(n), open_[n] = row_[n];
        Real* sums = rows_ + 2 * n * row_size() + kRowPadding + s.column;
        Real* weighted = sums + row_size();
        const Real* from = grads + n * kStride + s.offset;
        for (int64_t j = 0; j < s.length; j += N) {
          const V grad = load(from + j), inside = j + N <= s.length ? grad : first_lanes(grad, s.length - j);
          store(sums + j, load(sums + j) + inside);
          store(weighted + j, load(weighted + j) + row_fraction_[n] * inside);
        }
      }
    }
  }

  void end_gradients() {
    for (int64_t n = 0; n < count_; n++) close(n);
  }

 private:
  const AttentionArgs& args_;
  const Real *grid_x_, *grid_y_;
  const int64_t stride_, first_pixel_;
  const Real *table_, *positions_;
  bool narrow_ = false;
  int64_t first_ = 0, count_ = 0;
  Real x_[kBlock], y_[kBlock];
  // With unit_step, the column of query 0; its fraction is that of every query.
  int64_t start_[kBlock];
  Real fraction_[kBlock];
  // The table row above the one that the queries of a map row look up, and how far below it they do.
  Int row_[kBlock];
  Real row_fraction_[kBlock];
  // Gradients: the table row that a key's rows belong to, sums and sums weighted with the fraction.
  Int open_[kBlock];
  Real *rows_ = nullptr, *grad_table_ = nullptr, *grad_positions_ = nullptr;

  // Queries of one row of the map; `offset` counts from the first of all.
  struct Segment {
    int64_t row, column, offset, length;
    DAT_HOST_DEVICE int64_t end() const { return offset + length; }
  };

  DAT_HOST_DEVICE Segment segment(int64_t first, int64_t count, int64_t offset) const {
    const int64_t query = first + offset, column = query % args_.W, left = args_.W - column;
    return {query / args_.W, column, offset, left < count - offset ? left : count - offset};
  }

  // No key further away meets the table, and pixels of the others fit in integers. NaN is clamped too.
  static DAT_HOST_DEVICE Real clamp(Real x) {
    x = x > -64 ? x : Real(-64);
    return x < 64 ? x : Real(64);
  }
  static DAT_HOST_DEVICE int64_t floor(double x) {
    const int64_t whole = static_cast<int64_t>(x);
    return x < whole ? whole - 1 : whole;
  }
  static DAT_HOST_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
  static DAT_HOST_DEVICE I clamp(I x, int64_t low, int64_t high) {
    x = x < Int(low) ? I{} + Int(low) : x;
    return x > Int(high) ? I{} + Int(high) : x;
  }
  static DAT_HOST_DEVICE V first_lanes(V v, int64_t count) {
    for (int64_t i = count; i < N; i++) v[i] = 0;
    return v;
  }

  // grid_sample's own steps: a pixel must not change for the rounding.
  static DAT_HOST_DEVICE V pixel(V displacement, int64_t size) {
    return (displacement * Real(0.5) + 1) * Real(0.5) * Real(size - 1);
  }
  static DAT_HOST_DEVICE I floor(V x) {
    const I whole = Lanes<Real>::truncate(x);
    return x < Lanes<Real>::to_real(whole) ? whole - 1 : whole;
  }

  DAT_HOST_DEVICE void look_up_rows(int64_t row) {
    for (int64_t n = 0; n < count_; n += N) {
      const V y = pixel(grid_y_[row] - load(y_ + n), args_.T_h);
      const I low = floor(y);
      store(row_fraction_ + n, y - Lanes<Real>::to_real(low));
      Store<Int, N, Int>::to(row_ + n, clamp(low, -kRowMargin, args_.T_h));
    }
  }

  DAT_HOST_DEVICE Columns<Real> columns(int64_t n, int64_t column) const {
    const V x = pixel(load(grid_x_ + column) - x_[n], args_.T_w);
    const I low = floor(x);
    const V fraction = x - Lanes<Real>::to_real(low);
    if (narrow_) return {clamp(low[0], -2 * N - 1, args_.T_w), low - low[0], fraction};
    return {0, clamp(low, -kRowMargin, args_.T_w), fraction};
  }

  DAT_HOST_DEVICE int64_t unit_column(int64_t n, int64_t column) const {
    return clamp(start_[n] + column, -N - 1, args_.T_w);
  }

  DAT_HOST_DEVICE V pick_columns(const Real* row, I index) const {
#if defined(__GNUC__) && !defined(__clang__)
    if (narrow_) return __builtin_shuffle(load(row), load(row + N), index);
#endif
    V picked;
    for (int i = 0; i < N; i++) picked[i] = row[index[i]];
    return picked;
  }

  template <bool kUnit>
  void fill_rows(Real* scores, int64_t first, int64_t count) {
    for (Segment s = segment(first, count, 0); s.length > 0; s = segment(first, count, s.end())) {
      look_up_rows(s.row);
      for (int64_t n = 0; n < count_; n++) {
        const Real* row = table_ + row_[n] * stride_;
        Real* to = scores + n * kStride + s.offset;
        for (int64_t j = 0; j < s.length; j += N)
          store(to + j, kUnit ? unit_bias(row, n, s.column + j) : bias(row, n, s.column + j));
      }
    }
  }

  // Sums of weights times entries, as differences of infinite entries would be NaN.
  DAT_HOST_DEVICE V unit_bias(const Real* row, int64_t n, int64_t column) const {
    const Real *high = row + unit_column(n, column), *low = high + stride_;
    const Real lower = row_fraction_[n], upper = 1 - lower;
    const V left = upper * load(high) + lower * load(low), right = upper * load(high + 1) + lower * load(low + 1);
    return (1 - fraction_[n]) * left + fraction_[n] * right;
  }

  DAT_HOST_DEVICE V bias(const Real* row, int64_t n, int64_t column) const {
    const Columns<Real> at = columns(n, column);
    const Real *high = row + at.first, *low = high + stride_;
    const Real lower = row_fraction_[n], upper = 1 - lower;
    const V left = upper * pick_columns(high, at.index) + lower * pick_columns(low, at.index);
    const V right = upper * pick_columns(high, at.index + 1) + lower * pick_columns(low, at.index + 1);
    return (1 - at.fraction) * left + at.fraction * right;
  }

  // Scatters the gradients collected for key n into the table and the key's position.
  void close(int64_t n) {
    if (open_[n] < -kRowMargin) return;
    Real *sums = rows_ + 2 * n * row_size() + kRowPadding, *weighted = sums + row_size();
    V grad_x = {}, grad_y = {};
    const int64_t row = open_[n] * stride_;
    args_.unit_step ? spread_unit(n, row, sums, weighted, grad_x, grad_y) : spread(n, row, sums, weighted, grad_x, grad_y);
    grad_positions_[2 * n] -= Sum<Real, N>::of(grad_x) * (args_.T_w - 1) / 4;
    grad_positions_[2 * n + 1] -= Sum<Real, N>::of(grad_y) * (args_.T_h - 1) / 4;
    for (int64_t j = 0; j < args_.W; j += N) store(sums + j, V{}), store(weighted + j, V{});
  }

  void spread_unit(int64_t n, int64_t row, const Real* sums, const Real* weighted, V& grad_x, V& grad_y) {
    const Real right = fraction_[n], left = 1 - right;
    // The last query's right-hand column is one beyond its left-hand one.
    for (int64_t j = 0; j <= args_.W; j += N) {
      const int64_t pixel = row + unit_column(n, j);
      const V all = load(sums + j), low = load(weighted + j), high = all - low;
      const V low_before = load(weighted + j - 1), high_before = load(sums + j - 1) - low_before;
      const Real *from = table_ + pixel, *below = from + stride_;
      const V high_slope = load(from + 1) - load(from), low_slope = load(below + 1) - load(below);
      grad_x += high * high_slope + low * low_slope;
      grad_y += all * (load(below) - load(from) + right * (low_slope - high_slope));
      Real* to = grad_table_ + pixel;
      store(to, load(to) + left * high + right * high_before);
      store(to + stride_, load(to + stride_) + left * low + right * low_before);
    }
  }

  void spread(int64_t n, int64_t row, const Real* sums, const Real* weighted, V& grad_x, V& grad_y) {
    for (int64_t j = 0; j < args_.W; j += N) {
      const Columns<Real> at = columns(n, j);
      const Real *from = table_ + row + at.first, *below = from + stride_;
      const V all = load(sums + j), low = load(weighted + j), high = all - low;
      const V left_high = pick_columns(from, at.index), left_low = pick_columns(below, at.index);
      const V high_slope = pick_columns(from, at.index + 1) - left_high;
      const V low_slope = pick_columns(below, at.index + 1) - left_low;
      grad_x += high * high_slope + low * low_slope;
      grad_y += all * (left_low - left_high + at.fraction * (low_slope - high_slope));
      Real* to = grad_table_ + row + at.first;
      const V right_high = at.fraction * high, right_low = at.fraction * low;
      const int64_t lanes = args_.W - j < N ? args_.W - j : N;
      for (int64_t i = 0; i < lanes; i++) {
        Real* pixel = to + at.index[i];
        pixel[0] += high[i] - right_high[i], pixel[1] += right_high[i];
        pixel[stride_] += low[i] - right_low[i], pixel[stride_ + 1] += right_low[i];
      }
    }
  }
};

}  // namespace attention
}  // namespace DAT_ISA
}  // namespace dat
