// The kernels of deform_sample, compiled once for each instruction set: see vector.h. No standard library here.

#include "deform_sample.h"
#include "vector.h"

namespace dat {
namespace DAT_ISA {

// The samples of one head, field by field; a register of them is prepared at a time.
template <typename Real>
struct Samples {
  using Number = Lanes<Real>;
  using Int = IntOf<Real>;
  static constexpr int N = Number::kCount;

  int64_t count;
  Int* rows[4];
  Real* corner_weights[4];
  Int* inside;
  Int *height, *width, *start;

  Samples(void* scratch, const SampleArgs& args) : count(args.L * args.P) {
    const int64_t padded = (count + N - 1) / N * N;
    Real* reals = static_cast<Real*>(scratch);
    for (int c = 0; c < 4; c++) corner_weights[c] = reals + c * padded;
    Int* ints = reinterpret_cast<Int*>(reals + 4 * padded);
    for (int c = 0; c < 4; c++) rows[c] = ints + c * padded;
    inside = ints + 4 * padded, height = ints + 5 * padded, width = ints + 6 * padded, start = ints + 7 * padded;
    for (int64_t k = 0; k < padded; k++) {
      const Level level = k < count ? args.levels[k / args.P] : Level{0, 0, 0};
      height[k] = level.height, width[k] = level.width, start[k] = level.start;
    }
  }

  // Corner rows and weights, with the attention weights (if any) folded in.
  DAT_HOST_DEVICE void prepare(const Real* locations, const Real* weights, bool align_corners) {
    int64_t k = 0;
    for (; k + N <= count; k += N) prepare_lanes(k, locations + 2 * k, weights ? weights + k : nullptr, align_corners);
    if (k == count) return;
    Real last_locations[2 * N] = {}, last_weights[N] = {};
    for (int64_t i = 0; i < 2 * (count - k); i++) last_locations[i] = locations[2 * k + i];
    for (int64_t i = 0; weights && i < count - k; i++) last_weights[i] = weights[k + i];
    prepare_lanes(k, last_locations, weights ? last_weights : nullptr, align_corners);
  }

  DAT_HOST_DEVICE void prepare_lanes(int64_t k, const Real* locations, const Real* weights, bool align_corners) {
    using RealVec = typename Number::Real;
    using IntVec = typename Number::Int;
    const Numbers<Real, N> first = {load(locations)}, second = {load(locations + N)};
    const IntVec heights = load(height + k), widths = load(width + k), starts = load(start + k);
    const auto x = interpolate<Number>(pick<0, 2>(first, second, Indices<N>()), widths, align_corners);
    const auto y = interpolate<Number>(pick<1, 2>(first, second, Indices<N>()), heights, align_corners);
    const RealVec weight = weights ? load(weights) : RealVec{} + 1;
    const RealVec low_weight = weight * y.low_weight, high_weight = weight * y.high_weight;
    const IntVec low = starts + y.low * widths, high = starts + y.high * widths;
    store(rows[0] + k, low + x.low), store(corner_weights[0] + k, low_weight * x.low_weight);
    store(rows[1] + k, low + x.high), store(corner_weights[1] + k, low_weight * x.high_weight);
    store(rows[2] + k, high + x.low), store(corner_weights[2] + k, high_weight * x.low_weight);
    store(rows[3] + k, high + x.high), store(corner_weights[3] + k, high_weight * x.high_weight);
    store(inside + k, x.inside & y.inside);
  }

  template <typename T>
  static DAT_HOST_DEVICE Vec<T, N> load(const T* p) {
    return Load<T, N, T>::from(p);
  }
  template <typename T>
  static DAT_HOST_DEVICE void store(T* p, Vec<T, N> v) {
    Store<T, N, T>::to(p, v);
  }
};

// Channels d .. d + K * N of the sum over samples begin..end, kept in K registers.
template <typename T, typename Real, int N, int K>
DAT_HOST_DEVICE void gather(const Samples<Real>& s, const T* value, int64_t stride, int64_t begin, int64_t end, T* out) {
  Vec<Real, N> sum[K] = {};
  for (int64_t k = begin; k < end; k++) {
    if (!s.inside[k]) continue;
    for (int c = 0; c < 4; c++) {
      const T* row = value + s.rows[c][k] * stride;
      for (int i = 0; i < K; i++) sum[i] += s.corner_weights[c][k] * Load<Real, N, T>::from(row + i * N);
    }
  }
  for (int i = 0; i < K; i++) Store<Real, N, T>::to(out + i * N, sum[i]);
}

// All D channels: as many as fit into registers at a time, then narrower vectors for the rest.
template <typename T, typename Real, int N>
struct GatherChannels {
  static DAT_HOST_DEVICE void run(
      const Samples<Real>& s, const T* value, int64_t stride, int64_t begin, int64_t end, T* out, int64_t D) {
    int64_t d = 0;
    if constexpr (N == kLanes<Real>) {
      for (; d + 4 * N <= D; d += 4 * N) gather<T, Real, N, 4>(s, value + d, stride, begin, end, out + d);
      for (; d + 2 * N <= D; d += 2 * N) gather<T, Real, N, 2>(s, value + d, stride, begin, end, out + d);
    }
    for (; d + N <= D; d += N) gather<T, Real, N, 1>(s, value + d, stride, begin, end, out + d);
    if constexpr (N > 1) {
      if (d < D) GatherChannels<T, Real, N / 2>::run(s, value + d, stride, begin, end, out + d, D - d);
    }
  }
};

template <typename T, typename Real>
void forward(const SampleArgs& args, void* out, void* scratch, int64_t begin, int64_t end) {
  const int64_t samples = args.L * args.P, stride = args.H * args.D;
  const Real* locations = static_cast<const Real*>(args.locations);
  const Real* weights = static_cast<const Real*>(args.weights);
  Samples<Real> s(scratch, args);
  for (int64_t bq = begin; bq < end; bq++) {
    const T* image = static_cast<const T*>(args.value) + bq / args.Q * args.S * stride;
    for (int64_t h = 0; h < args.H; h++) {
      const int64_t head = bq * args.H + h;
      const int64_t first = head * samples;
      s.prepare(locations + 2 * first, weights ? weights + first : nullptr, args.align_corners);
      const T* value = image + h * args.D;
      T* to = static_cast<T*>(out) + (args.weighted ? head : first) * args.D;
      if (args.weighted) {
        GatherChannels<T, Real, kLanes<Real>>::run(s, value, stride, 0, samples, to, args.D);
      } else {
        for (int64_t k = 0; k < samples; k++)
          GatherChannels<T, Real, kLanes<Real>>::run(s, value, stride, k, k + 1, to + k * args.D, args.D);
      }
    }
  }
}

// Adds to the corners' inner products with `out`, and the corners' share of `out` to their gradients, over D channels.
template <typename T, typename Real, int N>
struct ScatterChannels {
  static DAT_HOST_DEVICE void run(
      const T* out, const T* const (&rows)[4], Real* const (&grads)[4], const Real (&weights)[4], Real (&dot)[4], int64_t d,
      int64_t D) {
    if (d + N <= D) {
      Vec<Real, N> products[4] = {};
      for (; d + N <= D; d += N) {
        const Vec<Real, N> grad = Load<Real, N, T>::from(out + d);
        for (int c = 0; c < 4; c++) {
          products[c] += grad * Load<Real, N, T>::from(rows[c] + d);
          // Corners that were clamped into the map share a row: one is written before the next is read.
          const Vec<Real, N> sum = Load<Real, N, Real>::from(grads[c] + d) + weights[c] * grad;
          Store<Real, N, Real>::to(grads[c] + d, sum);
        }
      }
      for (int c = 0; c < 4; c++) dot[c] += Sum<Real, N>::of(products[c]);
    }
    if constexpr (N > 1) {
      if (d < D) ScatterChannels<T, Real, N / 2>::run(out, rows, grads, weights, dot, d, D);
    }
  }
};

// A register of samples along one axis, lane by lane.
template <typename Real>
struct AxisLanes {
  using Number = Lanes<Real>;
  static constexpr int N = Number::kCount;

  IntOf<Real> low[N], high[N];
  Real low_weight[N], high_weight[N];
  Real low_slope[N], high_slope[N];
  IntOf<Real> inside[N];

  DAT_HOST_DEVICE AxisLanes(const Real* locations, const IntOf<Real>* sizes, bool align_corners) {
    const auto axis = interpolate<Number>(
        Load<Real, N, Real>::from(locations), Load<IntOf<Real>, N, IntOf<Real>>::from(sizes), align_corners);
    static_assert(sizeof(axis) == sizeof(*this), "an axis of vectors is laid out as arrays of their lanes");
    __builtin_memcpy(this, &axis, sizeof(axis));
  }

  DAT_HOST_DEVICE Axis<Real, int> operator[](int i) const {
    return {int(low[i]), int(high[i]), low_weight[i], high_weight[i], low_slope[i], high_slope[i], int(inside[i])};
  }
};

// All samples of head h on levels begin..end of image b, a register of them at a time, query after query.
template <typename T, typename Real>
void backward_unit(const SampleArgs& args, const SampleGrads& grads, int64_t b, int64_t h, int64_t begin, int64_t end) {
  constexpr int N = kLanes<Real>;
  const int64_t stride = args.H * args.D, origin = b * args.S * stride + h * args.D;
  const T* value = static_cast<const T*>(args.value) + origin;
  Real* by_value = static_cast<Real*>(grads.by_value) + origin;
  const Real* locations = static_cast<const Real*>(args.locations);
  const Real* weights = static_cast<const Real*>(args.weights);
  Real* by_locations = static_cast<Real*>(grads.by_locations);
  Real* by_weights = static_cast<Real*>(grads.by_weights);
  int64_t q = 0, l = begin, p = 0;
  while (q < args.Q && args.P > 0) {
    int64_t heads[N], samples[N];
    Real x_locations[N] = {}, y_locations[N] = {};
    IntOf<Real> heights[N] = {}, widths[N] = {}, starts[N];
    int count = 0;
    for (; count < N && q < args.Q; count++) {
      heads[count] = (b * args.Q + q) * args.H + h;
      samples[count] = (heads[count] * args.L + l) * args.P + p;
      x_locations[count] = locations[2 * samples[count]];
      y_locations[count] = locations[2 * samples[count] + 1];
      heights[count] = args.levels[l].height, widths[count] = args.levels[l].width, starts[count] = args.levels[l].start;
      if (++p < args.P) continue;
      p = 0;
      if (++l < end) continue;
      l = begin, q++;
    }
    const AxisLanes<Real> xs(x_locations, widths, args.align_corners), ys(y_locations, heights, args.align_corners);
    for (int i = 0; i < count; i++) {
      const Axis<Real, int> x = xs[i], y = ys[i];
      const int64_t k = samples[i];
      const Real weight = weights ? weights[k] : Real(1);
      SampleGrad<Real> grad = {0, 0, 0};
      if (x.inside && y.inside) {
        const int64_t low = starts[i] + int64_t(y.low) * widths[i], high = starts[i] + int64_t(y.high) * widths[i];
        const int64_t at[4] = {
            (low + x.low) * stride, (low + x.high) * stride, (high + x.low) * stride, (high + x.high) * stride};
        const T* const rows[4] = {value + at[0], value + at[1], value + at[2], value + at[3]};
        Real* const row_grads[4] = {by_value + at[0], by_value + at[1], by_value + at[2], by_value + at[3]};
        const Real low_weight = weight * y.low_weight, high_weight = weight * y.high_weight;
        const Real corner_weights[4] = {
            low_weight * x.low_weight, low_weight * x.high_weight, high_weight * x.low_weight, high_weight * x.high_weight};
        const T* out = static_cast<const T*>(grads.out) + (args.weighted ? heads[i] : k) * args.D;
        Real dot[4] = {};
        ScatterChannels<T, Real, N>::run(out, rows, row_grads, corner_weights, dot, 0, args.D);
        grad = sample_grad(x, y, dot);
      }
      by_locations[2 * k] = weight * grad.x;
      by_locations[2 * k + 1] = weight * grad.y;
      if (weights) by_weights[k] = grad.weight;
    }
  }
}

template <typename T, typename Real>
void backward(const SampleArgs& args, const SampleGrads& grads, int64_t levels, int64_t begin, int64_t end) {
  const int64_t parts = args.L / levels;
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t head = unit / parts, first = unit % parts * levels;
    backward_unit<T, Real>(args, grads, head / args.H, head % args.H, first, first + levels);
  }
}

inline void forward_any(const SampleArgs& args, void* out, void* scratch, int64_t begin, int64_t end) {
  switch (args.type) {
    case ValueType::kFloat32: return forward<float, float>(args, out, scratch, begin, end);
    case ValueType::kFloat64: return forward<double, double>(args, out, scratch, begin, end);
    case ValueType::kBFloat16: return forward<BFloat16, float>(args, out, scratch, begin, end);
    case ValueType::kFloat16: return forward<Float16, float>(args, out, scratch, begin, end);
  }
}

inline void backward_any(const SampleArgs& args, const SampleGrads& grads, int64_t levels, int64_t begin, int64_t end) {
  switch (args.type) {
    case ValueType::kFloat32: return backward<float, float>(args, grads, levels, begin, end);
    case ValueType::kFloat64: return backward<double, double>(args, grads, levels, begin, end);
    case ValueType::kBFloat16: return backward<BFloat16, float>(args, grads, levels, begin, end);
    case ValueType::kFloat16: return backward<Float16, float>(args, grads, levels, begin, end);
  }
}

}  // namespace DAT_ISA
}  // namespace dat
