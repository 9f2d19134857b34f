// Chooses a layout of rows and a grid for each call, and launches. No torch here: tests/cuda_host runs this on the host.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "backward.cuh"
#include "deterministic.cuh"
#include "forward.cuh"
#include "reference_grad.cuh"

namespace dat {

// Blocks that keep the largest GPUs busy, and the most that a grid's second and third dimension may have.
constexpr int64_t kManyBlocks = 1024;
constexpr int64_t kMaxGrid = 65535;

// Channels of a head that have kernels of their own: those of the detectors, and of DAT's sampled keys and values. All other
// heads run on masked layouts.
template <template <typename> typename Source>
struct Channels;
template <>
struct Channels<Attention> : std::integer_sequence<int, 32, 64> {};
template <>
struct Channels<WeightedPoints> : std::integer_sequence<int, 32> {};
template <>
struct Channels<LonePoints> : std::integer_sequence<int, 64, 96, 128> {};

// The layout for rows of kD channels in packs of kWidth: one pack for each lane, or three.
template <typename T, int kWidth, int kD>
constexpr auto rows_of() {
  constexpr int packs = kD / kWidth, each = packs % 3 == 0 ? 3 : 1;
  return Rows<T, packs / each, each, kWidth, false>();
}

// Whether the row stride fits in the int used by unmasked layouts.
inline bool steps_fit(const Geometry& g) {
  int64_t width = 1;
  for (int l = 0; l < g.L; l++) width = std::max<int64_t>(width, g.levels[l].width);
  // Divisions, since the product may be beyond 64 bits.
  const int64_t H = std::max<int64_t>(1, g.H), D = std::max<int64_t>(1, g.D);
  return H <= INT32_MAX / D && width <= INT32_MAX / (H * D);
}

// Calls `call` with the layout for rows of D channels, in packs of kWidth where `aligned` says that all rows start at whole
// vectors. The rows of kD channels have layouts of their own.
template <typename T, int kWidth, int... kD, typename Call>
cudaError_t with_rows(const Geometry& g, std::integer_sequence<int, kD...>, bool aligned, const Call& call) {
  if constexpr (kWidth > 1) {
    if (aligned && steps_fit(g)) {
      cudaError_t error = cudaSuccess;
      if (((g.D == kD && (error = call(rows_of<T, kWidth, kD>()), true)) || ...)) return error;
    }
    if (aligned && g.D % kWidth == 0) return call(Rows<T, 8, 2, kWidth, true>());
  }
  return call(Rows<T, 8, 4, 1, true>());
}

// Channels of a pack. Forward moves whole vectors. Backward adds four floats at a time, and neighbouring lanes must add to
// neighbouring ones: with more channels to a lane an atomic operation of a warp would touch every other 16 bytes.
template <typename T>
constexpr int kForwardWidth = sizeof(T) <= sizeof(float) ? kVectorBytes / sizeof(T) : 1;
template <typename T>
constexpr int kBackwardWidth = sizeof(T) <= sizeof(float) ? 4 : 1;

template <typename T>
bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

struct Grid {
  int64_t blocks;
  unsigned threads;
};

// Tiles of the levels where the queries are their pixels, as in an encoder's self-attention.
inline int64_t set_tiles(Geometry& g, int height) {
  g.tiled = true;
  g.tile_height = height;
  g.block_queries = kTileWidth * height;
  int64_t tiles = 0;
  for (int l = 0; l < g.L; l++) {
    g.first_tile[l] = static_cast<int>(tiles);
    tiles += int64_t(tiles_across(g.levels[l])) * ((g.levels[l].height + height - 1) / height);
  }
  return tiles;
}

// Sets how blocks take queries. Small calls get small blocks, that they may use the whole device.
template <typename Rows, typename Source>
Grid plan(Geometry& g) {
  const int64_t queries = Source::queries(g);
  if (!Source::kRowPerSample && queries == g.S) {
    const int64_t tiles = set_tiles(g, 8);
    if (tiles * g.B * g.H >= kManyBlocks) return {tiles, Rows::kThreads};
    return {set_tiles(g, std::max(1, Rows::kGroups / kTileWidth)), Rows::kThreads};
  }
  g.tiled = false;
  unsigned threads = Rows::kThreads;
  const auto blocks = [&] { return (queries * Rows::kLanes + threads - 1) / threads; };
  while (threads > 64 && blocks() * g.B * g.H < kManyBlocks) threads /= 2;
  g.block_queries = static_cast<int>(threads / Rows::kLanes);
  return {blocks(), threads};
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), int64_t x, int64_t y, int64_t z, unsigned threads, cudaStream_t stream,
    const Arguments&... arguments) {
  if (x == 0 || y == 0 || z == 0) return cudaSuccess;
  if (x > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(
      static_cast<unsigned>(x), static_cast<unsigned>(std::min(y, kMaxGrid)), static_cast<unsigned>(std::min(z, kMaxGrid)));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Source is WeightedPoints, LonePoints or Attention.
template <template <typename> typename Source, typename T, typename Input>
cudaError_t run_forward(
    Geometry g, const Input& in, Pointer<const T> value, Pointer<T> out, bool aligned, cudaStream_t stream) {
  return with_rows<T, kForwardWidth<T>>(g, Channels<Source>(), aligned, [&](auto rows) {
    using Rows = decltype(rows);
    const Grid grid = plan<Rows, Source<Rows>>(g);
    return launch(forward_kernel<Rows, Source>, grid.blocks, g.H, g.B, grid.threads, stream, g, in, value, out);
  });
}

template <template <typename> typename Source, typename T, typename Real, typename Input, typename Grads>
cudaError_t run_backward(
    Geometry g, const Input& in, const Grads& grads, Pointer<const T> grad, Pointer<const T> value, Pointer<Real> grad_value,
    bool aligned, cudaStream_t stream) {
  return with_rows<T, kBackwardWidth<T>>(g, Channels<Source>(), aligned, [&](auto rows) {
    using Rows = decltype(rows);
    const Grid grid = plan<Rows, Source<Rows>>(g);
    return launch(
        backward_kernel<Rows, Source>, grid.blocks, g.H, g.B, grid.threads, stream, g, in, grads, grad, value, grad_value);
  });
}

// Sorted keys of a batch and, for each, which of its samples it was.
struct Order {
  Pointer<const int> keys;
  Pointer<const int64_t> samples;
};

// Samples sorted at a time; each takes about 30 bytes of memory.
constexpr int64_t kMaxBatch = int64_t(1) << 23;

inline std::vector<Batch> batches(const Geometry& g, int64_t most) {
  const int64_t queries = std::clamp<int64_t>(most / std::max(1, g.samples()), 1, std::max<int64_t>(1, g.Q));
  // Keys count the pixels of all units of a batch in 32 bits.
  const int64_t units =
      std::max<int64_t>(1, std::min(most / (queries * g.samples()), INT32_MAX / std::max<int64_t>(1, g.S)));
  std::vector<Batch> all;
  for (int64_t unit = 0; unit < g.B * g.H; unit += units)
    for (int64_t query = 0; query < g.Q; query += queries)
      all.push_back({unit, std::min(units, g.B * g.H - unit), query, std::min(queries, g.Q - query)});
  return all;
}

template <typename T, typename Real>
cudaError_t sum_pixels(
    const Geometry& g, const Batch& batch, const KeptInput<Real>& kept, bool row_per_sample, const Order& order,
    Pointer<const T> grad, Pointer<Real> grad_value, bool aligned, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const bool wide = aligned && g.D % kWidth == 0;
  int lanes = 1;
  while (lanes < 32 && lanes * (wide ? kWidth : 1) < g.D) lanes *= 2;
  const int64_t blocks = (batch.units * g.S * lanes + kSortThreads - 1) / kSortThreads;
  return launch(
      wide ? sum_pixels_kernel<kWidth, T, Real> : sum_pixels_kernel<1, T, Real>, std::min<int64_t>(blocks, INT32_MAX), 1, 1,
      kSortThreads, stream, g, batch, kept, row_per_sample, lanes, order.keys, order.samples, grad, grad_value);
}

// Adds to `grad_value` in the same order every time. `sort(batch, fill)` makes the keys of a batch by `fill(keys)` and
// returns their stable order.
template <typename T, typename Real, typename Sort>
cudaError_t run_deterministic(
    const Geometry& g, const KeptInput<Real>& kept, bool row_per_sample, Pointer<const T> grad, Pointer<Real> grad_value,
    bool aligned, int64_t most, cudaStream_t stream, const Sort& sort) {
  if (g.samples() == 0 || g.D == 0 || g.S == 0) return cudaSuccess;
  for (const Batch& batch : batches(g, most)) {
    cudaError_t error = cudaSuccess;
    const Order order = sort(batch.size(g), [&](Pointer<int> keys) {
      const int64_t blocks = std::min<int64_t>((batch.size(g) + kSortThreads - 1) / kSortThreads, INT32_MAX);
      error = launch(keys_kernel<Real>, blocks, 1, 1, kSortThreads, stream, g, batch, kept, keys);
    });
    if (error == cudaSuccess)
      error = sum_pixels<T, Real>(g, batch, kept, row_per_sample, order, grad, grad_value, aligned, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Gradients by reference [B, Q, L, 2 or 4] from those by pixels.
template <typename T, typename Real>
cudaError_t run_reference_grad(
    const Geometry& g, const AttentionInput<Real>& in, Pointer<const Real> grad_pixels, Pointer<Real> grad_reference,
    cudaStream_t stream) {
  constexpr int kWarps = kReferenceThreads / 32;
  const int64_t blocks = std::min<int64_t>((g.B * g.Q * g.L + kWarps - 1) / kWarps, INT32_MAX);
  return launch(reference_grad_kernel<T, Real>, blocks, 1, 1, kReferenceThreads, stream, g, in, grad_pixels, grad_reference);
}

}  // namespace dat
