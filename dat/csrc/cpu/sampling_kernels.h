// The kernels of the sampling ops, compiled once for each instruction set: see vector.h. No standard library here.
#pragma once

#include "sampling.h"
#include "vector.h"

namespace dat {
namespace DAT_ISA {
namespace sampling {

template <typename T, typename Real>
DAT_HOST_DEVICE void read(const T* from, int64_t count, Real* to) {
  constexpr int N = kLanes<Real>;
  int64_t i = 0;
  for (; i + N <= count; i += N) Store<Real, N, Real>::to(to + i, Load<Real, N, T>::from(from + i));
  for (; i < count; i++) Store<Real, 1, Real>::to(to + i, Load<Real, 1, T>::from(from + i));
}

template <typename T, typename Real>
DAT_HOST_DEVICE void write(const Real* from, int64_t count, T* to) {
  constexpr int N = kLanes<Real>;
  int64_t i = 0;
  for (; i + N <= count; i += N) Store<Real, N, T>::to(to + i, Load<Real, N, Real>::from(from + i));
  for (; i < count; i++) Store<Real, 1, T>::to(to + i, Load<Real, 1, Real>::from(from + i));
}

// Turns logits, filled up to whole registers with minus infinity, into attention.
template <typename Real>
DAT_HOST_DEVICE void softmax(Real* logits, int64_t padded) {
  constexpr int N = kLanes<Real>;
  using V = Vec<Real, N>;
  V top = Load<Real, N, Real>::from(logits), sum = {};
  for (int64_t k = N; k < padded; k += N) {
    const V next = Load<Real, N, Real>::from(logits + k);
    top = next > top ? next : top;
  }
  const V max = V{} + Max<Real, N>::of(top);
  for (int64_t k = 0; k < padded; k += N) {
    const V e = Exp<Real, N>::of(Load<Real, N, Real>::from(logits + k) - max);
    Store<Real, N, Real>::to(logits + k, e);
    sum += e;
  }
  const V scale = 1 / (V{} + Sum<Real, N>::of(sum));
  for (int64_t k = 0; k < padded; k += N)
    Store<Real, N, Real>::to(logits + k, Load<Real, N, Real>::from(logits + k) * scale);
}

// Walks over the rows (query, head) of a part: one row at a time or, where a row has few samples, as many rows as fill a
// register with theirs. Sample k of row i is element i * count + k of every array.
template <typename T, typename Real, bool kBackward>
class Batch {
 public:
  using Number = Lanes<Real>;
  using Int = IntOf<Real>;
  using RealVec = typename Number::Real;
  using IntVec = typename Number::Int;
  static constexpr int N = Number::kCount;

  const SampleArgs& args;
  const Part& part;
  // Samples of a row; of a batch, in whole registers.
  const int64_t count, capacity, padded;
  // Rows of this batch: of each its number among all of [B, Q, H], and its head counted from the part's first.
  int64_t rows = 0;
  int64_t row[N], head[N];

  // Corner rows of `value` and their weights, with the attention weights (if any) folded in.
  Int* corner_rows[4];
  Real* corner_weights[4];
  Int* inside;
  Real *locations, *weights;
  // For backward: products of the corner rows with the output's gradient, and the gradients that follow from them.
  Real *dots, *grad_locations, *grad_weights;

  Batch(const SampleArgs& args, const Part& part, void* scratch)
      : args(args),
        part(part),
        count(args.L * args.P),
        capacity(args.reference || count == 0 || count >= N ? 1 : N / count),
        padded((capacity * count + N - 1) / N * N),
        free_(static_cast<char*>(scratch)),
        query_(part.query_begin),
        head_(part.head_begin) {
    for (int c = 0; c < 4; c++) corner_rows[c] = take<Int>(1), corner_weights[c] = take<Real>(1);
    inside = take<Int>(1), height_ = take<Int>(1), width_ = take<Int>(1), start_ = take<Int>(1);
    locations = take<Real>(2), weights = take<Real>(1), centers_ = take<Real>(2), units_ = take<Real>(2);
    dots = take<Real>(4), grad_locations = take<Real>(2), grad_weights = take<Real>(1);
    for (int i = 0; i < 4; i++) x_[i] = take<Real>(1), y_[i] = take<Real>(1);
    for (int64_t k = 0; k < padded; k++) {
      const Level level = k < capacity * count ? args.levels[k / args.P % args.L] : Level{0, 0, 0};
      height_[k] = level.height, width_[k] = level.width, start_[k] = level.start;
      // An empty level has nothing to sample, wherever that is.
      units_[2 * k] = 1 / Real(level.width ? level.width : 1), units_[2 * k + 1] = 1 / Real(level.height ? level.height : 1);
    }
  }

  // Prepares the next rows, if there are any left.
  DAT_HOST_DEVICE bool next() {
    for (rows = 0; rows < capacity && query_ < part.query_end; rows++) {
      row[rows] = (part.image * args.Q + query_) * args.H + head_;
      head[rows] = head_ - part.head_begin;
      if (args.reference)
        args.narrow ? place<T>() : place<Real>();
      else
        copy_points();
      if (++head_ == part.head_end) head_ = part.head_begin, query_++;
    }
    if (rows == 0) return false;
    for (int64_t k = 0; k < padded; k += N) prepare(k);
    return true;
  }

  // Gradients of locations (times the weight) and weights of every sample, from `dots`.
  DAT_HOST_DEVICE void differentiate() {
    for (int64_t k = 0; k < padded; k += N) {
      Axis<RealVec, IntVec> x, y;
      x.low_weight = load(x_[0] + k), x.high_weight = load(x_[1] + k), x.low_slope = load(x_[2] + k);
      x.high_slope = load(x_[3] + k);
      y.low_weight = load(y_[0] + k), y.high_weight = load(y_[1] + k), y.low_slope = load(y_[2] + k);
      y.high_slope = load(y_[3] + k);
      const Numbers<Real, N> first = {load(dots + 4 * k)}, second = {load(dots + 4 * k + N)};
      const Numbers<Real, N> third = {load(dots + 4 * k + 2 * N)}, fourth = {load(dots + 4 * k + 3 * N)};
      const Numbers<Real, N> low_columns[2] = {even(first, second), even(third, fourth)};
      const Numbers<Real, N> high_columns[2] = {odd(first, second), odd(third, fourth)};
      const RealVec dot[4] = {
          even(low_columns[0], low_columns[1]).v, even(high_columns[0], high_columns[1]).v,
          odd(low_columns[0], low_columns[1]).v, odd(high_columns[0], high_columns[1]).v};
      const SampleGrad<RealVec> grad = sample_grad(x, y, dot);
      // A sample outside counts for nothing, even with an infinite weight.
      const RealVec weight = load(inside + k) == 0 ? RealVec{} : args.weighted ? load(weights + k) : RealVec{} + 1;
      const Numbers<Real, N> grad_x = {weight * grad.x}, grad_y = {weight * grad.y};
      store(grad_locations + 2 * k, zip<0>(grad_x, grad_y, Indices<N>()));
      store(grad_locations + 2 * k + N, zip<N / 2>(grad_x, grad_y, Indices<N>()));
      store(grad_weights + k, grad.weight);
    }
  }

  // Gradients of ms_deform_attn's inputs, from those of locations and weights. A batch is one row.
  template <typename U>
  DAT_HOST_DEVICE void write_points_gradients(const SampleGrads& grads) {
    RealVec sum = {};
    for (int64_t k = 0; k < padded; k += N) sum += load(weights + k) * load(grad_weights + k);
    const RealVec mean = RealVec{} + Sum<Real, N>::of(sum);
    for (int64_t k = 0; k < padded; k += N) store(grad_weights + k, load(weights + k) * (load(grad_weights + k) - mean));
    write(grad_weights, count, static_cast<U*>(grads.grad_logits) + row[0] * count);
    if (grads.grad_reference) write_reference_gradients<U>(grads);
    for (int64_t i = 0; i < 2 * padded; i += N) {
      // The unit of an infinite box is infinite, and its samples are outside: their gradient stays zero.
      const RealVec by = load(grad_locations + i);
      store(grad_locations + i, by == 0 ? RealVec{} : by * load(units_ + i));
    }
    write(grad_locations, 2 * count, static_cast<U*>(grads.grad_offsets) + 2 * row[0] * count);
  }

 private:
  char* free_;
  int64_t query_, head_;
  Int *height_, *width_, *start_;
  // A location is its center plus its offset times its unit.
  Real *centers_, *units_;
  int64_t placed_ = -1;
  Real *x_[4], *y_[4];

  template <typename U>
  U* take(int64_t numbers) {
    // One register more, so that the arrays do not fall into the same sets of the cache.
    U* taken = reinterpret_cast<U*>(free_);
    free_ += numbers * (padded + N) * sizeof(U);
    for (int64_t i = 0; i < numbers * (padded + N); i++) taken[i] = 0;
    return taken;
  }

  template <typename U>
  static DAT_HOST_DEVICE Vec<U, N> load(const U* p) {
    return Load<U, N, U>::from(p);
  }
  template <typename U>
  static DAT_HOST_DEVICE void store(U* p, Vec<U, N> v) {
    Store<U, N, U>::to(p, v);
  }
  static DAT_HOST_DEVICE Numbers<Real, N> even(const Numbers<Real, N>& a, const Numbers<Real, N>& b) {
    return {pick<0, 2>(a, b, Indices<N>())};
  }
  static DAT_HOST_DEVICE Numbers<Real, N> odd(const Numbers<Real, N>& a, const Numbers<Real, N>& b) {
    return {pick<1, 2>(a, b, Indices<N>())};
  }

  // Rows that a head reads lie a whole query apart, too far for the hardware to prefetch them.
  static DAT_HOST_DEVICE void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
  }

  template <typename U>
  DAT_HOST_DEVICE void prefetch_points(const void* pairs, const void* numbers) {
    const int64_t ahead = (row[rows] + 4 * args.H) * count;
    prefetch(static_cast<const U*>(pairs) + 2 * ahead, 2 * count * sizeof(U));
    if (numbers) prefetch(static_cast<const U*>(numbers) + ahead, count * sizeof(U));
  }

  DAT_HOST_DEVICE void copy_points() {
    if (kBackward) prefetch_points<Real>(args.locations, args.weights);
    const int64_t first = row[rows] * count;
    read(static_cast<const Real*>(args.locations) + 2 * first, 2 * count, locations + 2 * rows * count);
    if (args.weights) read(static_cast<const Real*>(args.weights) + first, count, weights + rows * count);
  }

  // ms_deform_attn's locations and weights of a row (Deformable DETR, equation 3 and appendix A.4).
  template <typename U>
  DAT_HOST_DEVICE void place() {
    if (placed_ != query_) place_centers();
    if (kBackward) prefetch_points<U>(args.offsets, args.logits);
    const int64_t first = row[0] * count;
    read(static_cast<const U*>(args.offsets) + 2 * first, 2 * count, locations);
    for (int64_t i = 0; i < 2 * padded; i += N)
      store(locations + i, load(centers_ + i) + load(locations + i) * load(units_ + i));
    read(static_cast<const U*>(args.logits) + first, count, weights);
    for (int64_t k = count; k < padded; k++) weights[k] = -__builtin_huge_val();
    softmax(weights, padded);
  }

  DAT_HOST_DEVICE void place_centers() {
    placed_ = query_;
    const Real* reference =
        static_cast<const Real*>(args.reference) + (part.image * args.Q + query_) * args.L * args.reference_size;
    const bool boxes = args.reference_size == 4;
    int64_t k = 0;
    for (int64_t l = 0; l < args.L; l++, reference += args.reference_size) {
      for (int64_t p = 0; p < args.P; p++, k++) {
        centers_[2 * k] = reference[0], centers_[2 * k + 1] = reference[1];
        if (boxes) units_[2 * k] = reference[2] / Real(2 * args.P), units_[2 * k + 1] = reference[3] / Real(2 * args.P);
      }
    }
  }

  template <typename U>
  DAT_HOST_DEVICE void write_reference_gradients(const SampleGrads& grads) {
    Real* grad_reference = static_cast<Real*>(grads.grad_reference) + row[0] * args.L * args.reference_size;
    const U* offsets = static_cast<const U*>(args.offsets) + 2 * row[0] * count;
    const Real* by = grad_locations;
    for (int64_t l = 0; l < args.L; l++, grad_reference += args.reference_size) {
      for (int64_t i = 0; i < args.reference_size; i++) grad_reference[i] = 0;
      for (int64_t p = 0; p < args.P; p++, by += 2, offsets += 2) {
        grad_reference[0] += by[0], grad_reference[1] += by[1];
        // An infinite offset is outside: its gradient of zero must not become NaN.
        for (int i = 0; i < 2 && args.reference_size == 4; i++)
          if (by[i] != 0) grad_reference[2 + i] += by[i] * Load<Real, 1, U>::from(offsets + i)[0] / Real(2 * args.P);
      }
    }
  }

  DAT_HOST_DEVICE void prepare(int64_t k) {
    const Numbers<Real, N> first = {load(locations + 2 * k)}, second = {load(locations + 2 * k + N)};
    const IntVec heights = load(height_ + k), widths = load(width_ + k), starts = load(start_ + k);
    const auto x = interpolate<Number>(even(first, second).v, widths, args.align_corners);
    const auto y = interpolate<Number>(odd(first, second).v, heights, args.align_corners);
    const RealVec weight = args.weighted ? load(weights + k) : RealVec{} + 1;
    const RealVec low_weight = weight * y.low_weight, high_weight = weight * y.high_weight;
    const IntVec low = starts + y.low * widths, high = starts + y.high * widths;
    store(corner_rows[0] + k, low + x.low), store(corner_weights[0] + k, low_weight * x.low_weight);
    store(corner_rows[1] + k, low + x.high), store(corner_weights[1] + k, low_weight * x.high_weight);
    store(corner_rows[2] + k, high + x.low), store(corner_weights[2] + k, high_weight * x.low_weight);
    store(corner_rows[3] + k, high + x.high), store(corner_weights[3] + k, high_weight * x.high_weight);
    store(inside + k, x.inside & y.inside);
    if constexpr (kBackward) {
      store(x_[0] + k, x.low_weight), store(x_[1] + k, x.high_weight), store(x_[2] + k, x.low_slope);
      store(x_[3] + k, x.high_slope);
      store(y_[0] + k, y.low_weight), store(y_[1] + k, y.high_weight), store(y_[2] + k, y.low_slope);
      store(y_[3] + k, y.high_slope);
      for (int64_t i = 0; i < 4; i++) store(dots + 4 * k + i * N, RealVec{});
    }
  }
};

// All D channels: as many as fit into K registers at a time, then narrower vectors for the rest.
// Step::run<N, K>(d) does channels d .. d + K * N.
template <int N, typename Step>
DAT_HOST_DEVICE void for_channels(const Step& step, int64_t d, int64_t D) {
  if constexpr (N == Step::kLanes) {
    for (; d + 4 * N <= D; d += 4 * N) step.template run<N, 4>(d);
    for (; d + 2 * N <= D; d += 2 * N) step.template run<N, 2>(d);
  }
  for (; d + N <= D; d += N) step.template run<N, 1>(d);
  if constexpr (N > 1) {
    if (d < D) for_channels<N / 2>(step, d, D);
  }
}

// A copy of where a batch keeps its corners: stores through other pointers cannot change it, which keeps it in registers.
template <typename Real>
struct Corners {
  const IntOf<Real>* rows[4];
  const Real* weights[4];
  const IntOf<Real>* inside;

  template <typename Batch>
  DAT_HOST_DEVICE explicit Corners(const Batch& batch) : inside(batch.inside) {
    for (int c = 0; c < 4; c++) rows[c] = batch.corner_rows[c], weights[c] = batch.corner_weights[c];
  }
};

// The weighted sum of samples begin..end.
template <typename T, typename Real>
struct Gather {
  static constexpr int kLanes = DAT_ISA::kLanes<Real>;
  const Batch<T, Real, false>& batch;
  const T* value;
  int64_t stride, begin, end;
  T* out;

  template <int N, int K>
  DAT_HOST_DEVICE void run(int64_t d) const {
    const Corners<Real> corners(batch);
    if constexpr (kIsBFloat16<T> && K % 2 == 0 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) return run_pairs<N, K>(d);
    // Two sums in turn: an addition need not wait for the one before.
    Vec<Real, N> sum[2][K] = {};
    for (int64_t k = begin; k < end; k++) {
      if (!corners.inside[k]) continue;
      for (int c = 0; c < 4; c++) {
        const T* row = value + corners.rows[c][k] * stride + d;
        const Real weight = corners.weights[c][k];
        for (int i = 0; i < K; i++) sum[c % 2][i] += weight * Load<Real, N, T>::from(row + i * N);
      }
    }
    for (int i = 0; i < K; i++) Store<Real, N, T>::to(out + d + i * N, sum[0][i] + sum[1][i]);
  }

  // Two registers of bfloat16 in one load, of which one sum takes the even channels and one the odd: widening them apart
  // takes half the steps that widening them in order does.
  template <int N, int K>
  DAT_HOST_DEVICE void run_pairs(int64_t d) const {
    const Corners<Real> corners(batch);
    Vec<Real, N> even[K / 2] = {}, odd[K / 2] = {};
    for (int64_t k = begin; k < end; k++) {
      if (!corners.inside[k]) continue;
      for (int c = 0; c < 4; c++) {
        const T* row = value + corners.rows[c][k] * stride + d;
        const Real weight = corners.weights[c][k];
        for (int i = 0; i < K / 2; i++) {
          Vec<uint32_t, N> pairs;
          __builtin_memcpy(&pairs, row + 2 * i * N, sizeof(pairs));
          even[i] += weight * (Vec<float, N>)(pairs << 16);
          odd[i] += weight * (Vec<float, N>)(pairs & 0xffff0000u);
        }
      }
    }
    for (int i = 0; i < K / 2; i++) {
      const Numbers<Real, N> low = {even[i]}, high = {odd[i]};
      Store<Real, N, T>::to(out + d + 2 * i * N, zip<0>(low, high, Indices<N>()));
      Store<Real, N, T>::to(out + d + (2 * i + 1) * N, zip<N / 2>(low, high, Indices<N>()));
    }
  }
};

template <typename T, typename Real>
void forward(const SampleArgs& args, const Part& part, void* out, void* scratch) {
  Batch<T, Real, false> batch(args, part, scratch);
  while (batch.next()) {
    for (int64_t i = 0; i < batch.rows; i++) {
      const T* value = static_cast<const T*>(part.value) + batch.head[i] * args.D;
      // A row of the output holds the sum, or all samples one after the other.
      const int64_t samples = args.weighted ? batch.count : 1, first = i * batch.count;
      T* to = static_cast<T*>(out) + batch.row[i] * (batch.count / samples) * args.D;
      for (int64_t k = first; k < first + batch.count; k += samples, to += args.D) {
        const Gather<T, Real> gather = {batch, value, part.stride, k, k + samples, to};
        for_channels<kLanes<Real>>(gather, 0, args.D);
      }
    }
  }
}

// Adds the contributions of samples begin..end to the gradients of their corner rows, and the corner rows' products with the
// output's gradient to `dots`.
template <typename T, typename Real>
struct Scatter {
  static constexpr int kLanes = DAT_ISA::kLanes<Real>;
  const Batch<T, Real, true>& batch;
  const T* value;
  int64_t stride;
  Real* grad_value;
  int64_t grad_stride, begin, end;
  const T* out;

  template <int N, int K>
  DAT_HOST_DEVICE void run(int64_t d) const {
    const Corners<Real> corners(batch);
    Vec<Real, N> grad[K];
    for (int i = 0; i < K; i++) grad[i] = Load<Real, N, T>::from(out + d + i * N);
    Real* dots = batch.dots + 4 * begin;
    for (int64_t k = begin; k < end; k++, dots += 4) {
      if (!corners.inside[k]) continue;
      Vec<Real, N> products[4] = {};
      for (int c = 0; c < 4; c++) {
        const T* row = value + corners.rows[c][k] * stride + d;
        Real* to = grad_value + corners.rows[c][k] * grad_stride + d;
        const Real weight = corners.weights[c][k];
        for (int i = 0; i < K; i++) {
          products[c] += grad[i] * Load<Real, N, T>::from(row + i * N);
          // Corners clamped into the map may be the same row: one is written before the next is read.
          add_to<Real, N>(to + i * N, weight * grad[i]);
        }
      }
      add_sums<Real, N>(dots, products);
    }
  }
};

template <typename T, typename Real>
void backward(const SampleArgs& args, const Part& part, const SampleGrads& grads, void* scratch) {
  Batch<T, Real, true> batch(args, part, scratch);
  while (batch.next()) {
    for (int64_t i = 0; i < batch.rows; i++) {
      const T* value = static_cast<const T*>(part.value) + batch.head[i] * args.D;
      Real* grad_value = static_cast<Real*>(part.grad_value) + batch.head[i] * args.D;
      const int64_t samples = args.weighted ? batch.count : 1, first = i * batch.count;
      const T* out = static_cast<const T*>(grads.out) + batch.row[i] * (batch.count / samples) * args.D;
      for (int64_t k = first; k < first + batch.count; k += samples, out += args.D) {
        const Scatter<T, Real> scatter = {batch, value, part.stride, grad_value, part.grad_stride, k, k + samples, out};
        for_channels<kLanes<Real>>(scatter, 0, args.D);
      }
    }
    batch.differentiate();
    if (args.reference) {
      args.narrow ? batch.template write_points_gradients<T>(grads) : batch.template write_points_gradients<Real>(grads);
      continue;
    }
    for (int64_t i = 0; i < batch.rows; i++) {
      const int64_t first = batch.row[i] * batch.count;
      write(
          batch.grad_locations + 2 * i * batch.count, 2 * batch.count, static_cast<Real*>(grads.grad_locations) + 2 * first);
      if (args.weighted)
        write(batch.grad_weights + i * batch.count, batch.count, static_cast<Real*>(grads.grad_weights) + first);
    }
  }
}

template <typename T, typename Real>
struct WriteRow {
  static constexpr int kLanes = DAT_ISA::kLanes<Real>;
  const Real* sums;
  int64_t copies, copy_stride;
  T* row;

  template <int N, int K>
  DAT_HOST_DEVICE void run(int64_t d) const {
    for (int i = 0; i < K; i++) {
      Vec<Real, N> sum = Load<Real, N, Real>::from(sums + d + i * N);
      for (int64_t c = 1; c < copies; c++) sum += Load<Real, N, Real>::from(sums + c * copy_stride + d + i * N);
      Store<Real, N, T>::to(row + d + i * N, sum);
    }
  }
};

template <typename T, typename Real>
void write_rows(
    const SampleArgs& args, const void* sums, int64_t copies, int64_t copy_stride, void* rows, int64_t stride,
    int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const WriteRow<T, Real> write = {
        static_cast<const Real*>(sums) + i * args.D, copies, copy_stride, static_cast<T*>(rows) + i * stride};
    for_channels<kLanes<Real>>(write, 0, args.D);
  }
}

inline void forward_any(const SampleArgs& args, const Part& part, void* out, void* scratch) {
  DAT_FOR_VALUE_TYPE(args.type, forward, args, part, out, scratch);
}

inline void backward_any(const SampleArgs& args, const Part& part, const SampleGrads& grads, void* scratch) {
  DAT_FOR_VALUE_TYPE(args.type, backward, args, part, grads, scratch);
}

inline void write_rows_any(
    const SampleArgs& args, const void* sums, int64_t copies, int64_t copy_stride, void* rows, int64_t stride,
    int64_t count) {
  DAT_FOR_VALUE_TYPE(args.type, write_rows, args, sums, copies, copy_stride, rows, stride, count);
}

constexpr SampleKernels kKernels = {forward_any, backward_any, write_rows_any};

}  // namespace sampling
}  // namespace DAT_ISA
}  // namespace dat
