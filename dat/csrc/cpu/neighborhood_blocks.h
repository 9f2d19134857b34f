// Building blocks of neighborhood_attn's kernels: registers turned between pixels and channels, products of pixels with
// their neighbours, and sums of neighbours. No standard library here.
#pragma once

#include "vector.h"

namespace dat {
namespace DAT_ISA {
namespace neighborhood {

// Rows of queries (or of keys) processed together, so that each load serves all of them.
constexpr int kRows = 3;
// Shifts, and channels, whose sums for kRows rows fit into the registers.
constexpr int kTaps = DAT_VECTOR_BYTES == 64 ? 7 : 4;
constexpr int kChannels = DAT_VECTOR_BYTES == 64 ? 8 : 4;

constexpr int64_t kLineBytes = 64;

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
inline int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }
inline int64_t at_least(int64_t count, int64_t limit) { return count > limit ? count : limit; }

// Loads a register for several uses. Compilers would rather read memory again for every use, and reading a register from
// between two cache lines takes twice as long as multiplying it.
template <typename Real>
DAT_HOST_DEVICE Vec<Real, kLanes<Real>> load_once(const Real* from) {
  Vec<Real, kLanes<Real>> v = load(from);
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// Interleaving the halves of a list of registers moves the bits of a number's place round by one; once for each bit of the
// lane, rows have become columns.
template <typename Real, int N>
DAT_HOST_DEVICE void transpose(Numbers<Real, N> (&tile)[N]) {
#pragma GCC unroll 4
  for (int step = 1; step < N; step *= 2) {
    Numbers<Real, N> next[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; i++) {
      next[2 * i].v = zip<0>(tile[i], tile[i + N / 2], Indices<N>());
      next[2 * i + 1].v = zip<N / 2>(tile[i], tile[i + N / 2], Indices<N>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) tile[i] = next[i];
  }
}

// `count` numbers, the rest zero.
template <typename T, typename Real, int N>
DAT_HOST_DEVICE Vec<Real, N> load_some(const T* from, int64_t count) {
  if (count >= N) return Load<Real, N, T>::from(from);
  T some[N] = {};
  for (int64_t i = 0; i < count; i++) some[i] = from[i];
  return Load<Real, N, T>::from(some);
}

template <typename T, typename Real, int N>
DAT_HOST_DEVICE void store_some(T* to, Vec<Real, N> v, int64_t count) {
  if (count >= N) return Store<Real, N, T>::to(to, v);
  T some[N];
  Store<Real, N, T>::to(some, v);
  for (int64_t i = 0; i < count; i++) to[i] = some[i];
}

// Turns `pixels` pixels of C channels, `step` numbers apart, into rows of channels `stride` numbers apart, times `factor`.
// Pixels are filled up to whole registers, and channels to `channels`, with zeros. Returns whether all numbers are finite.
template <typename T, typename Real>
bool load_pixels(
    const T* from, int64_t step, int64_t pixels, int64_t C, Real factor, Real* to, int64_t stride, int64_t channels) {
  constexpr int N = kLanes<Real>;
  // Stays zero until infinity or NaN is multiplied by zero.
  Vec<Real, N> zero = {};
  for (int64_t x = 0; x < pixels; x += N) {
    for (int64_t c = 0; c < channels; c += N) {
      Numbers<Real, N> tile[N];
      for (int i = 0; i < N && x + N + i < pixels; i++) __builtin_prefetch(from + (x + N + i) * step + c);
      for (int i = 0; i < N; i++)
        tile[i].v = x + i < pixels ? load_some<T, Real, N>(from + (x + i) * step + c, C - c) * factor : Vec<Real, N>{};
      for (int i = 0; i < N; i++) zero += tile[i].v * 0;
      transpose(tile);
      const int64_t rows = at_most(N, channels - c);
      for (int64_t i = 0; i < rows; i++) store(to + (c + i) * stride + x, tile[i].v);
    }
  }
  return Sum<Real, N>::of(zero) == 0;
}

// The other way round.
template <typename T, typename Real>
void store_pixels(const Real* from, int64_t stride, int64_t pixels, int64_t C, Real factor, T* to, int64_t step) {
  constexpr int N = kLanes<Real>;
  for (int64_t x = 0; x < pixels; x += N) {
    for (int64_t c = 0; c < C; c += N) {
      Numbers<Real, N> tile[N];
      for (int i = 0; i < N; i++) tile[i].v = c + i < C ? load(from + (c + i) * stride + x) * factor : Vec<Real, N>{};
      transpose(tile);
      const int64_t count = at_most(N, pixels - x);
      for (int64_t i = 0; i < count; i++) store_some<T, Real, N>(to + (x + i) * step + c, tile[i].v, C - c);
    }
  }
}

// Products of M rows of a register of pixels with T registers of the row `others`, each a pixel further than the one before:
// to[m] gets them `to_step` numbers apart.
template <typename Real, int M, int T>
void multiply(
    const Real* pixels, int64_t row, const Real* others, int64_t stride, int64_t channels, Real* const* to,
    int64_t to_step) {
  Vec<Real, kLanes<Real>> sums[M][T] = {};
  for (int64_t c = 0; c < channels; c++) {
    Vec<Real, kLanes<Real>> pixel[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) pixel[m] = load_once(pixels + m * row + c * stride);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      const Vec<Real, kLanes<Real>> other = load_once(others + c * stride + t);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][t] += pixel[m] * other;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) store(to[m] + t * to_step, sums[m][t]);
  }
}

template <typename Real>
using Multiply = void (*)(const Real*, int64_t, const Real*, int64_t, int64_t, Real* const*, int64_t);

template <typename Real, int M, int... kIndex>
Multiply<Real> choose_multiply(int64_t taps, Pick<kIndex...>) {
  static constexpr Multiply<Real> kChoices[] = {multiply<Real, M, kIndex + 1>...};
  return kChoices[taps - 1];
}

template <typename Real>
Multiply<Real> choose_multiply(int64_t rows, int64_t taps) {
  static_assert(kRows == 3);
  switch (rows) {
    case 1: return choose_multiply<Real, 1>(taps, Indices<kTaps>());
    case 2: return choose_multiply<Real, 2>(taps, Indices<kTaps>());
    default: return choose_multiply<Real, 3>(taps, Indices<kTaps>());
  }
}

// A row of pixels that is added to rows [begin, end) of sums, to each with its own factors.
template <typename Real>
struct Source {
  const Real* pixels;
  const Real* factors[kRows];
  int64_t begin, end;
};

template <typename Real>
using Sums = Vec<Real, kLanes<Real>>[kRows][kChannels];

// Adds `taps` registers of each channel of a source, each `pixel_step` after the one before, times their factors. With
// kMasked only lanes that are `inside` of a tap's register are: a factor of zero does not hide pixels that are not finite.
template <int kBegin, int kEnd, bool kMasked, typename Real>
DAT_HOST_DEVICE void add_source(
    Sums<Real>& sums, const Source<Real>& source, const Real* pixels, int64_t taps, int64_t factor_step, int64_t pixel_step,
    int64_t stride, const IntOf<Real>* inside) {
  constexpr int N = kLanes<Real>;
  for (int64_t t = 0; t < taps; t++) {
    Vec<Real, kLanes<Real>> factor[kEnd];
#pragma GCC unroll 8
    for (int m = kBegin; m < kEnd; m++) factor[m] = load_once(source.factors[m] + t * factor_step);
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; c++) {
      Vec<Real, N> pixel = load_once(pixels + t * pixel_step + c * stride);
      if constexpr (kMasked) pixel = Load<IntOf<Real>, N, IntOf<Real>>::from(inside + t * N) != 0 ? pixel : Vec<Real, N>{};
#pragma GCC unroll 8
      for (int m = kBegin; m < kEnd; m++) sums[m][c] += factor[m] * pixel;
    }
  }
}

// Adds sources to kRows rows of a register of pixels, `row` numbers apart (or writes them, where nothing is there yet).
template <bool kMasked, typename Real>
void add_sources(
    const Source<Real>* sources, int64_t count, int64_t taps, int64_t factor_step, int64_t pixel_step, int64_t stride,
    int64_t channels, bool fresh, Real* to, int64_t row, const IntOf<Real>* inside) {
  for (int64_t first = 0; first < channels; first += kChannels) {
    Sums<Real> sums;
    Real* place = to + first * stride;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
      for (int c = 0; c < kChannels; c++)
        sums[m][c] = fresh ? Vec<Real, kLanes<Real>>{} : load(place + m * row + c * stride);
    for (int64_t s = 0; s < count; s++) {
      const Source<Real>& source = sources[s];
      const Real* pixels = source.pixels + first * stride;
      static_assert(kRows == 3);
      switch (source.begin * 4 + source.end) {
        case 1: add_source<0, 1, kMasked>(sums, source, pixels, taps, factor_step, pixel_step, stride, inside); break;
        case 2: add_source<0, 2, kMasked>(sums, source, pixels, taps, factor_step, pixel_step, stride, inside); break;
        case 3: add_source<0, 3, kMasked>(sums, source, pixels, taps, factor_step, pixel_step, stride, inside); break;
        case 6: add_source<1, 2, kMasked>(sums, source, pixels, taps, factor_step, pixel_step, stride, inside); break;
        case 7: add_source<1, 3, kMasked>(sums, source, pixels, taps, factor_step, pixel_step, stride, inside); break;
        case 11: add_source<2, 3, kMasked>(sums, source, pixels, taps, factor_step, pixel_step, stride, inside); break;
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
      for (int c = 0; c < kChannels; c++) store(place + m * row + c * stride, sums[m][c]);
  }
}

}  // namespace neighborhood
}  // namespace DAT_ISA
}  // namespace dat
