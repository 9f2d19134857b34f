// Fixed-width vectors on GCC's and Clang's vector extensions, included once for each instruction set.
// DAT_ISA names the namespace and DAT_VECTOR_BYTES is the width of a register.
// No standard library here: an inline function of it that is compiled for AVX-512 could be the one that the linker keeps.

#ifndef DAT_CPU_FLOAT_TYPES
#define DAT_CPU_FLOAT_TYPES
namespace dat {
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
}  // namespace dat
#endif

namespace dat {
namespace DAT_ISA {

template <typename Real, int N>
struct VecOf {
  typedef Real type __attribute__((vector_size(N * sizeof(Real))));
};
template <typename Real, int N>
using Vec = typename VecOf<Real, N>::type;

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

}  // namespace DAT_ISA
}  // namespace dat
