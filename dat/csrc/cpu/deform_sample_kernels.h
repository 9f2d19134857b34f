// The kernels of deform_sample, compiled once for each instruction set: see vector.h. No standard library here.

#include "deform_sample.h"
#include "vector.h"

namespace dat {
namespace DAT_ISA {

// The samples of one head, field by field, so that one vectorised loop prepares them all.
template <typename Real>
struct Samples {
  int32_t* rows[4];
  Real* corner_weights[4];
  int32_t* inside;
  int32_t *height, *width, *start;

  Samples(void* scratch, const SampleArgs& args) {
    const int64_t n = args.L * args.P;
    Real* reals = static_cast<Real*>(scratch);
    for (int c = 0; c < 4; c++) corner_weights[c] = reals + c * n;
    int32_t* ints = reinterpret_cast<int32_t*>(reals + 4 * n);
    for (int c = 0; c < 4; c++) rows[c] = ints + c * n;
    inside = ints + 4 * n, height = ints + 5 * n, width = ints + 6 * n, start = ints + 7 * n;
    for (int64_t k = 0; k < n; k++) {
      const Level& level = args.levels[k / args.P];
      height[k] = level.height, width[k] = level.width, start[k] = level.start;
    }
  }

  // Corner rows and weights of `n` samples, with the attention weights (if any) folded in.
  void prepare(const Real* __restrict__ locations, const Real* __restrict__ weights, int64_t n, bool align_corners) {
    int32_t* __restrict__ r0 = rows[0], * __restrict__ r1 = rows[1], * __restrict__ r2 = rows[2], * __restrict__ r3 = rows[3];
    Real* __restrict__ w0 = corner_weights[0], * __restrict__ w1 = corner_weights[1];
    Real* __restrict__ w2 = corner_weights[2], * __restrict__ w3 = corner_weights[3];
    int32_t* __restrict__ in = inside;
    const int32_t* __restrict__ heights = height, * __restrict__ widths = width, * __restrict__ starts = start;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
      const Axis<Real> x = interpolate<Real>(locations[2 * k], widths[k], align_corners);
      const Axis<Real> y = interpolate<Real>(locations[2 * k + 1], heights[k], align_corners);
      const Real a = weights ? weights[k] : Real(1);
      const int32_t low = starts[k] + y.low * widths[k], high = starts[k] + y.high * widths[k];
      r0[k] = low + x.low, r1[k] = low + x.high, r2[k] = high + x.low, r3[k] = high + x.high;
      w0[k] = a * y.low_weight * x.low_weight, w1[k] = a * y.low_weight * x.high_weight;
      w2[k] = a * y.high_weight * x.low_weight, w3[k] = a * y.high_weight * x.high_weight;
      in[k] = x.inside & y.inside;
    }
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
  for (int i = 0; i < K; i++)
    for (int j = 0; j < N; j++) Store<T, Real>::to(out + i * N + j, sum[i][j]);
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
      s.prepare(locations + 2 * first, weights ? weights + first : nullptr, samples, args.align_corners);
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
          __builtin_memcpy(grads[c] + d, &sum, sizeof(sum));
        }
      }
      for (int c = 0; c < 4; c++) dot[c] += Sum<Real, N>::of(products[c]);
    }
    if constexpr (N > 1) {
      if (d < D) ScatterChannels<T, Real, N / 2>::run(out, rows, grads, weights, dot, d, D);
    }
  }
};

template <typename T, typename Real>
void backward_unit(const SampleArgs& args, const SampleGrads& grads, int64_t b, int64_t h, int64_t l) {
  const Level level = args.levels[l];
  const int64_t stride = args.H * args.D, origin = (b * args.S + level.start) * stride + h * args.D;
  const T* value = static_cast<const T*>(args.value) + origin;
  Real* by_value = static_cast<Real*>(grads.by_value) + origin;
  const Real* locations = static_cast<const Real*>(args.locations);
  const Real* weights = static_cast<const Real*>(args.weights);
  Real* by_locations = static_cast<Real*>(grads.by_locations);
  Real* by_weights = static_cast<Real*>(grads.by_weights);
  for (int64_t q = 0; q < args.Q; q++) {
    const int64_t head = (b * args.Q + q) * args.H + h;
    for (int64_t p = 0; p < args.P; p++) {
      const int64_t k = (head * args.L + l) * args.P + p;
      const Axis<Real> x = interpolate<Real>(locations[2 * k], level.width, args.align_corners);
      const Axis<Real> y = interpolate<Real>(locations[2 * k + 1], level.height, args.align_corners);
      SampleGrad<Real> grad = {0, 0, 0};
      const Real a = weights ? weights[k] : Real(1);
      if (x.inside && y.inside) {
        const int64_t low = int64_t(y.low) * level.width, high = int64_t(y.high) * level.width;
        const int64_t at[4] = {
            (low + x.low) * stride, (low + x.high) * stride, (high + x.low) * stride, (high + x.high) * stride};
        const T* const rows[4] = {value + at[0], value + at[1], value + at[2], value + at[3]};
        Real* const row_grads[4] = {by_value + at[0], by_value + at[1], by_value + at[2], by_value + at[3]};
        const Real low_weight = a * y.low_weight, high_weight = a * y.high_weight;
        const Real corner_weights[4] = {
            low_weight * x.low_weight, low_weight * x.high_weight, high_weight * x.low_weight, high_weight * x.high_weight};
        const T* out = static_cast<const T*>(grads.out) + (weights ? head : k) * args.D;
        Real dot[4] = {};
        ScatterChannels<T, Real, kLanes<Real>>::run(out, rows, row_grads, corner_weights, dot, 0, args.D);
        grad = sample_grad(x, y, dot);
      }
      by_locations[2 * k] = a * grad.x;
      by_locations[2 * k + 1] = a * grad.y;
      if (weights) by_weights[k] = grad.weight;
    }
  }
}

template <typename T, typename Real>
void backward(const SampleArgs& args, const SampleGrads& grads, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t head = unit / args.L;
    backward_unit<T, Real>(args, grads, head / args.H, head % args.H, unit % args.L);
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

inline void backward_any(const SampleArgs& args, const SampleGrads& grads, int64_t begin, int64_t end) {
  switch (args.type) {
    case ValueType::kFloat32: return backward<float, float>(args, grads, begin, end);
    case ValueType::kFloat64: return backward<double, double>(args, grads, begin, end);
    case ValueType::kBFloat16: return backward<BFloat16, float>(args, grads, begin, end);
    case ValueType::kFloat16: return backward<Float16, float>(args, grads, begin, end);
  }
}

}  // namespace DAT_ISA
}  // namespace dat
