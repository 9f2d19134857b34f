// Fixed-width vectors on GCC's and Clang's vector extensions, included once for each instruction set.
// DAT_ISA names the namespace and DAT_VECTOR_BYTES is the width of a register.
// No standard library here: an inline function of it that is compiled for AVX-512 could be the one that the linker keeps.
#pragma once

#include <cstdint>

#include "../bilinear.h"

namespace dat {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls a template <T, Real> for values of a `ValueType`.
#define DAT_FOR_VALUE_TYPE(type, function, ...)                               \
  switch (type) {                                                             \
    case ValueType::kFloat32: return function<float, float>(__VA_ARGS__);     \
    case ValueType::kFloat64: return function<double, double>(__VA_ARGS__);   \
    case ValueType::kBFloat16: return function<BFloat16, float>(__VA_ARGS__); \
    case ValueType::kFloat16: return function<Float16, float>(__VA_ARGS__);   \
  }                                                                           \
  __builtin_unreachable()

namespace DAT_ISA {

template <typename Real, int N>
struct VecOf {
  typedef Real type __attribute__((vector_size(N * sizeof(Real))));
};
template <typename Real, int N>
using Vec = typename VecOf<Real, N>::type;

template <typename T>
constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

// A vector whose type names its element and size, which templates cannot find out from the vector itself.
template <typename Real, int N>
struct Numbers {
  Vec<Real, N> v;
};

template <typename Real>
constexpr int kLanes = DAT_VECTOR_BYTES / sizeof(Real);

template <int... kIndex>
struct Pick {};
template <int N, int... kIndex>
struct MakePick {
  using type = typename MakePick<N - 1, N - 1, kIndex...>::type;
};
template <int... kIndex>
struct MakePick<0, kIndex...> {
  using type = Pick<kIndex...>;
};
template <int N>
using Indices = typename MakePick<N>::type;

// Lanes kFirst, kFirst + kStep, ... of the pair (a, b), as many as a Pick counts.
template <int kFirst, int kStep, typename Real, int N, int... kIndex>
DAT_HOST_DEVICE Vec<Real, sizeof...(kIndex)> pick(const Numbers<Real, N>& a, const Numbers<Real, N>& b, Pick<kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a.v, b.v, (kFirst + kStep * kIndex)...);
#else
  const Real lanes[] = {(kFirst + kStep * kIndex < N ? a : b).v[(kFirst + kStep * kIndex) % N]...};
  Vec<Real, sizeof...(kIndex)> picked;
  __builtin_memcpy(&picked, lanes, sizeof(picked));
  return picked;
#endif
}

// The integers that go with a vector of `Real`: comparisons of one select lanes of the other.
template <typename Real>
struct IntLike;
template <>
struct IntLike<float> {
  using type = int32_t;
};
template <>
struct IntLike<double> {
  using type = int64_t;
};
template <typename Real>
using IntOf = typename IntLike<Real>::type;

// A register of numbers, for `interpolate`.
template <typename Real_>
struct Lanes {
  static constexpr int kCount = kLanes<Real_>;
  using Real = Vec<Real_, kCount>;
  using Int = Vec<IntOf<Real_>, kCount>;
  static DAT_HOST_DEVICE Int truncate(Real x) { return __builtin_convertvector(x, Int); }
  static DAT_HOST_DEVICE Real to_real(Int x) { return __builtin_convertvector(x, Real); }
};

template <typename Real, int N, typename T>
struct Load {
  static DAT_HOST_DEVICE Vec<Real, N> from(const T* p) {
    Vec<Real, N> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
};

template <int N>
struct Load<float, N, BFloat16> {
  static DAT_HOST_DEVICE Vec<float, N> from(const BFloat16* p) {
    Vec<uint16_t, N> raw;
    __builtin_memcpy(&raw, p, sizeof(raw));
    return (Vec<float, N>)(__builtin_convertvector(raw, Vec<uint32_t, N>) << 16);
  }
};

template <int N>
struct Load<float, N, Float16> {
  static DAT_HOST_DEVICE Vec<float, N> from(const Float16* p) {
    Vec<uint16_t, N> raw;
    __builtin_memcpy(&raw, p, sizeof(raw));
    const Vec<uint32_t, N> wide = __builtin_convertvector(raw, Vec<uint32_t, N>);
    const Vec<uint32_t, N> magnitude = (wide & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and is exact for subnormals too.
    const Vec<float, N> scaled = (Vec<float, N>)magnitude * 5192296858534827628530496329220096.0f;
    const Vec<uint32_t, N> special = (Vec<uint32_t, N>)(magnitude >= 0x0f800000u) & 0x7f800000u;
    return (Vec<float, N>)((Vec<uint32_t, N>)scaled | special | ((wide & 0x8000u) << 16));
  }
};

template <typename Real, int N, typename T>
struct Store {
  static DAT_HOST_DEVICE void to(T* p, Vec<Real, N> v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <int N>
struct Store<float, N, BFloat16> {
  static DAT_HOST_DEVICE void to(BFloat16* p, Vec<float, N> v) {
    const Vec<uint32_t, N> bits = (Vec<uint32_t, N>)v;
    // Round to nearest, ties to even; a NaN must not round up to infinity.
    const Vec<uint32_t, N> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t, N> nan = (Vec<uint32_t, N>)(v != v);
    const Vec<uint16_t, N> half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Vec<uint16_t, N>);
    __builtin_memcpy(p, &half, sizeof(half));
  }
};

template <int N>
struct Store<float, N, Float16> {
  static DAT_HOST_DEVICE void to(Float16* p, Vec<float, N> v) {
    for (int i = 0; i < N; i++) p[i].bits = round(v[i]);
  }

  static DAT_HOST_DEVICE uint16_t round(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    const uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
    uint32_t half;
    if (magnitude >= 0x47800000u) {
      half = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    } else if (magnitude < 0x38800000u) {
      // Below 2^-14 the result is subnormal: adding 0.5 lets the addition round at bit 2^-24.
      float small;
      __builtin_memcpy(&small, &magnitude, sizeof(small));
      small += 0.5f;
      __builtin_memcpy(&half, &small, sizeof(half));
      half -= 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return half | sign >> 16;
  }
};

template <typename Real>
DAT_HOST_DEVICE Vec<Real, kLanes<Real>> load(const Real* from) {
  return Load<Real, kLanes<Real>, Real>::from(from);
}

template <typename Real>
DAT_HOST_DEVICE void store(Real* to, Vec<Real, kLanes<Real>> v) {
  Store<Real, kLanes<Real>, Real>::to(to, v);
}

// The sum of all lanes. Halves stay in registers: through memory they would cost a store and a load at every step.
template <typename Real, int N>
struct Sum {
  static DAT_HOST_DEVICE Real of(Vec<Real, N> v) {
    const Numbers<Real, N> all = {v};
    return Sum<Real, N / 2>::of(pick<0, 1>(all, all, Indices<N / 2>()) + pick<N / 2, 1>(all, all, Indices<N / 2>()));
  }
};

template <typename Real>
struct Sum<Real, 1> {
  static DAT_HOST_DEVICE Real of(Vec<Real, 1> v) { return v[0]; }
};

// Maximum over all lanes; the result is unspecified for NaN.
template <typename Real, int N>
struct Max {
  static DAT_HOST_DEVICE Real of(Vec<Real, N> v) {
    const Numbers<Real, N> all = {v};
    const Vec<Real, N / 2> low = pick<0, 1>(all, all, Indices<N / 2>()), high = pick<N / 2, 1>(all, all, Indices<N / 2>());
    return Max<Real, N / 2>::of(low > high ? low : high);
  }
};

template <typename Real>
struct Max<Real, 1> {
  static DAT_HOST_DEVICE Real of(Vec<Real, 1> v) { return v[0]; }
};

// Sums of neighbouring lanes: those of `a`, then those of `b`.
template <int kCount, typename Real, int N>
DAT_HOST_DEVICE Numbers<Real, kCount> add_neighbours(const Numbers<Real, N>& a, const Numbers<Real, N>& b) {
  return {pick<0, 2>(a, b, Indices<kCount>()) + pick<1, 2>(a, b, Indices<kCount>())};
}

// Neighbours are added until `kCount` lanes are left.
template <int kCount, typename Real, int N>
DAT_HOST_DEVICE Vec<Real, kCount> fold(const Numbers<Real, N>& v) {
  if constexpr (N == kCount) {
    return v.v;
  } else {
    return fold<kCount>(add_neighbours<N / 2>(v, v));
  }
}

template <typename Real, int N>
DAT_HOST_DEVICE void add_to(Real* p, Vec<Real, N> v) {
  Store<Real, N, Real>::to(p, Load<Real, N, Real>::from(p) + v);
}

// Adds the sums of four vectors to four numbers, in a third of the steps that four sums take.
template <typename Real, int N>
DAT_HOST_DEVICE void add_sums(Real* to, const Vec<Real, N> (&v)[4]) {
  if constexpr (N == 1) {
    for (int c = 0; c < 4; c++) to[c] += v[c][0];
  } else {
    const Numbers<Real, N> a = {v[0]}, b = {v[1]}, c = {v[2]}, d = {v[3]};
    const Numbers<Real, N> ab = add_neighbours<N>(a, b), cd = add_neighbours<N>(c, d);
    if constexpr (N == 2) {
      add_to<Real, 2>(to, ab.v), add_to<Real, 2>(to + 2, cd.v);
    } else {
      add_to<Real, 4>(to, fold<4>(add_neighbours<N>(ab, cd)));
    }
  }
}

// Lanes of `a` and `b` in turn, from lane kFirst of each.
template <int kFirst, typename Real, int N, int... kIndex>
DAT_HOST_DEVICE Vec<Real, N> zip(const Numbers<Real, N>& a, const Numbers<Real, N>& b, Pick<kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a.v, b.v, (kFirst + kIndex / 2 + kIndex % 2 * N)...);
#else
  const Real lanes[] = {(kIndex % 2 ? b : a).v[kFirst + kIndex / 2]...};
  Vec<Real, N> zipped;
  __builtin_memcpy(&zipped, lanes, sizeof(zipped));
  return zipped;
#endif
}

// exp of numbers that are not positive, as a softmax has them; NaN stays NaN.
template <typename Real, int N>
struct Exp {
  static DAT_HOST_DEVICE Vec<Real, N> of(Vec<Real, N> x) {
    for (int i = 0; i < N; i++) x[i] = __builtin_exp(x[i]);
    return x;
  }
};

// 2^n * exp(r) with |r| <= log(2) / 2, exp(r) by its Taylor polynomial of degree 7: the next term is 6e-9 of the result.
template <int N>
struct Exp<float, N> {
  static DAT_HOST_DEVICE Vec<float, N> of(Vec<float, N> x) {
    using Int = Vec<int32_t, N>;
    // Below, exp is subnormal; in a softmax, where the largest is 1, it is zero.
    const auto vanishes = x < -87.0f;
    x = vanishes ? Vec<float, N>{} : x;
    const Int n = __builtin_convertvector(x * 1.44269504f - 0.5f, Int);
    const Vec<float, N> whole = __builtin_convertvector(n, Vec<float, N>);
    // log(2) in two parts: whole times the first is exact.
    const Vec<float, N> r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec<float, N> p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Vec<float, N> scaled = p * (Vec<float, N>)((n + 127) << 23);
    return vanishes ? Vec<float, N>{} : scaled;
  }
};

}  // namespace DAT_ISA
}  // namespace dat
