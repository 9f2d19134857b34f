// Inputs of samples and outputs of their gradients: given points (deform_sample), or offsets and logits (ms_deform_attn).
//
// A source is the work of one group of lanes, in head `h` of image `b`. `sample(i)` is sample i of `count()`, of which the
// group's lanes take turns: `put_grad` and `sample` are called by the same lane for the same i. `row(i)` is the row of the
// output that it is added to.
#pragma once

#include "geometry.cuh"

namespace dat {

// Sums over the lanes of a group; all lanes of a warp take part.
template <int kLanes, typename Real>
__device__ __forceinline__ Real group_sum(Real x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

template <int kLanes, typename Real>
__device__ __forceinline__ Real group_max(Real x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Real other = __shfl_xor_sync(kWarp, x, step);
    // The comparison is false for NaN, which stays.
    x = x > other || x != x ? x : other;
  }
  return x;
}

// Pixels and weights of all samples for the deterministic sum by value; null where that is not asked for.
template <typename Real>
struct Kept {
  Pointer<Real> pixels, weights;

  __device__ __forceinline__ void put_pixel(int64_t k, const Sample<Real>& s) const {
    if (!pixels) return;
    put<Real>(pixels + 2 * k, s.pixel_x);
    put<Real>(pixels + 2 * k + 1, s.pixel_y);
  }
};

template <typename Real>
struct PointsInput {
  Pointer<const Real> locations, weights;
};

template <typename Real>
struct PointsGrads {
  Pointer<Real> grad_locations, grad_weights;
  Kept<Real> kept;
};

template <typename Real>
__device__ __forceinline__ Sample<Real> point(
    const Geometry& g, int level, Pointer<const Real> location, Pointer<const Real> weight) {
  Sample<Real> s;
  s.level = g.levels[level];
  const Real factor_x = static_cast<Real>(g.align_corners ? s.level.width - 1 : s.level.width);
  const Real factor_y = static_cast<Real>(g.align_corners ? s.level.height - 1 : s.level.height);
  const Real before = g.align_corners ? Real(0) : Real(0.5);
  s.pixel_x = get<Real>(location) * factor_x - before;
  s.pixel_y = get<Real>(location + 1) * factor_y - before;
  s.weight = weight ? get<Real>(weight) : Real(1);
  s.interpolate(factor_x, factor_y);
  return s;
}

template <typename Real>
__device__ __forceinline__ void put_point_grad(
    const PointsGrads<Real>& grads, int64_t k, const Sample<Real>& s, const Real (&dot)[4]) {
  SampleGrad<Real> grad = {0, 0, 0};
  if (s.inside) grad = sample_grad(s.x, s.y, dot);
  put<Real>(grads.grad_locations + 2 * k, s.inside ? s.weight * grad.x : Real(0));
  put<Real>(grads.grad_locations + 2 * k + 1, s.inside ? s.weight * grad.y : Real(0));
  if (grads.grad_weights) put<Real>(grads.grad_weights + k, grad.weight);
  grads.kept.put_pixel(k, s);
}

// deform_sample with weights: the L * P samples of a head, summed in one row.
template <typename Rows>
struct WeightedPoints {
  using Real = typename Rows::Real;
  using Input = PointsInput<Real>;
  using Grads = PointsGrads<Real>;
  static constexpr bool kRowPerSample = false;

  const Geometry& g;
  const bool active;
  const int64_t head;
  const Pointer<const Real> locations, weights;

  __device__ __forceinline__ WeightedPoints(const Geometry& g, const Input& in, int64_t b, int64_t h, int64_t query, int)
      : g(g),
        active(query >= 0),
        head((b * g.Q + query) * g.H + h),
        locations(in.locations + 2 * head * g.samples()),
        weights(in.weights + head * g.samples()) {}

  static DAT_HOST_DEVICE int64_t queries(const Geometry& g) { return g.Q; }
  __device__ __forceinline__ int count() const { return g.samples(); }
  __device__ __forceinline__ bool has(int i) const { return active && i < g.samples(); }
  __device__ __forceinline__ int64_t row(int) const { return active ? head : -1; }
  __device__ __forceinline__ Sample<Real> sample(int i) const {
    return point(g, g.level_of(i), locations + 2 * int64_t(i), weights + i);
  }
  __device__ __forceinline__ void put_grad(const Grads& grads, int i, const Real (&dot)[4]) {
    put_point_grad(grads, head * g.samples() + i, sample(i), dot);
  }
  __device__ __forceinline__ void finish(const Grads&, int) const {}
};

// deform_sample without weights: a "query" is as many samples as a group prepares together, each with a row of its own.
template <typename Rows>
struct LonePoints {
  using Real = typename Rows::Real;
  using Input = PointsInput<Real>;
  using Grads = PointsGrads<Real>;
  static constexpr bool kRowPerSample = true;

  const Geometry& g;
  const Input& in;
  // The first sample of the group, out of those of a head in all queries, and the head in the first query.
  const int64_t first, head;

  __device__ __forceinline__ LonePoints(const Geometry& g, const Input& in, int64_t b, int64_t h, int64_t query, int)
      : g(g), in(in), first(query < 0 ? g.Q * g.samples() : query * Rows::kSlots), head(b * g.Q * g.H + h) {}

  static DAT_HOST_DEVICE int64_t queries(const Geometry& g) { return (g.Q * g.samples() + Rows::kSlots - 1) / Rows::kSlots; }
  __device__ __forceinline__ int count() const { return Rows::kSlots; }
  __device__ __forceinline__ bool has(int i) const { return first + i < g.Q * g.samples(); }
  __device__ __forceinline__ int64_t row(int i) const {
    if (!has(i)) return -1;
    const int64_t item = first + i;
    // A division less for DAT, which takes one sample of one level.
    if (g.samples() == 1) return head + item * g.H;
    return (head + item / g.samples() * g.H) * g.samples() + item % g.samples();
  }
  __device__ __forceinline__ Sample<Real> sample(int i) const {
    const int level = g.L == 1 ? 0 : g.level_of(static_cast<int>((first + i) % g.samples()));
    return point(g, level, in.locations + 2 * row(i), Pointer<const Real>(nullptr));
  }
  __device__ __forceinline__ void put_grad(const Grads& grads, int i, const Real (&dot)[4]) {
    put_point_grad(grads, row(i), sample(i), dot);
  }
  __device__ __forceinline__ void finish(const Grads&, int) const {}
};

// Numbers in Real, or in T where they are narrow.
template <typename T, typename Real>
__device__ __forceinline__ Real get_either(Pointer<const char> numbers, bool narrow, int64_t k) {
  if (std::is_same_v<T, Real> || !narrow) return __ldg(view<const Real>(numbers + k * int64_t(sizeof(Real))));
  return widen(__ldg(view<const T>(numbers + k * int64_t(sizeof(T)))));
}

template <typename T, typename Real>
__device__ __forceinline__ void put_either(Pointer<char> numbers, bool narrow, int64_t k, Real x) {
  if (std::is_same_v<T, Real> || !narrow) {
    *view<Real>(numbers + k * int64_t(sizeof(Real))) = x;
  } else {
    ::dat::narrow(x, *view<T>(numbers + k * int64_t(sizeof(T))));
  }
}

template <typename Real>
struct AttentionInput {
  Pointer<const Real> reference;
  // Stored in the type of the values if `narrow`, otherwise in Real.
  Pointer<const char> offsets, logits;
  bool narrow;
  bool boxes;
  // Fraction of the box size that an offset of 1 corresponds to: 0.5 / num_points.
  Real box_share;
};

template <typename Real>
struct AttentionGrads {
  // In the layout of offsets and logits.
  Pointer<char> grad_offsets, grad_logits;
  // Gradients by attention weights on their way to those by logits; may be `grad_logits` itself.
  Pointer<Real> grad_weights;
  // Gradients by pixels, where those by reference points are to be made of them.
  Pointer<Real> grad_pixels;
  Kept<Real> kept;
};

// ms_deform_attn: softmax of a head's logits and locations around its query's reference, worked out on the fly.
template <typename Rows>
struct Attention {
  using T = typename Rows::T;
  using Real = typename Rows::Real;
  using Input = AttentionInput<Real>;
  using Grads = AttentionGrads<Real>;
  static constexpr bool kRowPerSample = false;

  const Geometry& g;
  const Input& in;
  const bool active;
  const int64_t query, head;
  const Pointer<const Real> reference;
  const Pointer<const char> offsets, logits;
  Real max, scale;
  // Contribution of this lane's samples to the sum of weights times their gradients.
  Real total = 0;

  // Groups without a query go through the shuffles with the samples of the first one.
  __device__ __forceinline__ Attention(const Geometry& g, const Input& in, int64_t b, int64_t h, int64_t q, int lane)
      : g(g),
        in(in),
        active(q >= 0),
        query(b * g.Q + (active ? q : 0)),
        head(query * g.H + h),
        reference(in.reference + query * g.L * components()),
        offsets(in.offsets + 2 * head * g.samples() * size()),
        logits(in.logits + head * g.samples() * size()) {
    Real most = -INFINITY;
    for (int i = lane; i < g.samples(); i += Rows::kLanes) {
      const Real x = logit(i);
      most = x > most || x != x ? x : most;
    }
    max = group_max<Rows::kLanes>(most);
    Real sum = 0;
    for (int i = lane; i < g.samples(); i += Rows::kLanes) sum += exp(logit(i) - max);
    scale = 1 / group_sum<Rows::kLanes>(sum);
  }

  static DAT_HOST_DEVICE int64_t queries(const Geometry& g) { return g.Q; }
  __device__ __forceinline__ int count() const { return g.samples(); }
  __device__ __forceinline__ bool has(int i) const { return active && i < g.samples(); }
  __device__ __forceinline__ int64_t row(int) const { return active ? head : -1; }

  // Bytes of an offset or logit.
  __device__ __forceinline__ int size() const {
    return static_cast<int>(std::is_same_v<T, Real> || !in.narrow ? sizeof(Real) : sizeof(T));
  }
  __device__ __forceinline__ int components() const { return in.boxes ? 4 : 2; }
  __device__ __forceinline__ Real logit(int i) const { return get_either<T, Real>(logits, in.narrow, i); }
  __device__ __forceinline__ Real attention(int i) const { return exp(logit(i) - max) * scale; }

  // Pixels for each unit of an offset along `axis`, in a level of `size` pixels.
  __device__ __forceinline__ Real reach(Pointer<const Real> point, int axis, int size) const {
    return in.boxes ? get<Real>(point + 2 + axis) * static_cast<Real>(size) * in.box_share : Real(1);
  }
  __device__ __forceinline__ Real pixel(Pointer<const Real> point, int i, int axis, int size) const {
    const Real offset = get_either<T, Real>(offsets, in.narrow, 2 * int64_t(i) + axis);
    return get<Real>(point + axis) * static_cast<Real>(size) + (offset * reach(point, axis, size) - Real(0.5));
  }
  __device__ __forceinline__ Sample<Real> sample(int i) const {
    const int level = g.level_of(i);
    const Pointer<const Real> point = reference + level * components();
    Sample<Real> s;
    s.level = g.levels[level];
    s.pixel_x = pixel(point, i, 0, s.level.width);
    s.pixel_y = pixel(point, i, 1, s.level.height);
    s.weight = attention(i);
    s.interpolate(1, 1);
    return s;
  }

  __device__ __forceinline__ void put_pixel_grad(const Grads& grads, int i, int axis, bool inside, Real x, int size) const {
    const int64_t k = 2 * (head * g.samples() + i) + axis;
    // Outside, a reach that is not finite must not make a zero into NaN.
    const Real grad_offset = inside ? x * reach(reference + g.level_of(i) * components(), axis, size) : Real(0);
    put_either<T, Real>(grads.grad_offsets, in.narrow, k, grad_offset);
    if (grads.grad_pixels) put<Real>(grads.grad_pixels + k, inside ? x : Real(0));
  }
  __device__ __forceinline__ void put_grad(const Grads& grads, int i, const Real (&dot)[4]) {
    const Sample<Real> s = sample(i);
    SampleGrad<Real> grad = {0, 0, 0};
    if (s.inside) grad = sample_grad(s.x, s.y, dot);
    put_pixel_grad(grads, i, 0, s.inside, grad.x * s.weight, s.level.width);
    put_pixel_grad(grads, i, 1, s.inside, grad.y * s.weight, s.level.height);
    const int64_t k = head * g.samples() + i;
    put<Real>(grads.grad_weights + k, grad.weight);
    total += s.weight * grad.weight;
    grads.kept.put_pixel(k, s);
    if (grads.kept.weights) put<Real>(grads.kept.weights + k, s.weight);
  }
  // Backward of the softmax.
  __device__ __forceinline__ void finish(const Grads& grads, int lane) const {
    const Real sum = group_sum<Rows::kLanes>(total);
    for (int i = lane; has(i); i += Rows::kLanes) {
      const int64_t k = head * g.samples() + i;
      const Real grad_weight = *view<Real>(grads.grad_weights + k);
      put_either<T, Real>(grads.grad_logits, in.narrow, k, attention(i) * (grad_weight - sum));
    }
  }
};

}  // namespace dat
