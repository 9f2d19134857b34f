// A map plus its 3x3 depth-wise convolution, and the gradients of that. Maps are [B, H, W, C], C a multiple of four. Each
// sum is in float32 and in a fixed order.
#pragma once

#include "channel_sums.cuh"

namespace dat {

constexpr int kTaps = 9;
// A thread walks down at most so many rows, and loads two more.
constexpr int kStripRows = 8;
// The convolution's threads compute two neighbouring columns from four: one column would take three loads for itself.
constexpr int kColumns = 2;
constexpr int kConvolveThreads = 128, kConvolveBlocks = 4;
constexpr int kGradBlocks = 2;
// Sums of a channel: those of the nine taps, and the bias's.
constexpr int kSums = kTaps + 1;
// Rows that a thread has on their way from memory, which divide the three that its loops are unrolled by.
template <typename T>
constexpr int kAhead = sizeof(T) == sizeof(float) ? 1 : 3;

// Sizes of a map, and how threads share it: each takes a pack of channels of one slot at a time, which is a strip of rows in
// a few columns of an image. Neighbouring threads are `lanes` packs of one of `tiles`; the others of a block take other
// slots.
struct DepthwiseMap {
  int H, W, C;
  int lanes, tiles;
  // Rows of a strip, strips of an image, and slots beside each other.
  int rows, strips, across;
  int64_t slots;
};

// A slot's image, rows from `begin` to `end` and first column.
struct Strip {
  int64_t image;
  int begin, end, column;
};

__device__ __forceinline__ Strip strip_of(const DepthwiseMap& m, unsigned slot, int columns) {
  const unsigned row = slot / m.across, image = row / m.strips;
  const int begin = static_cast<int>(row - image * m.strips) * m.rows;
  const int end = begin + m.rows < m.H ? begin + m.rows : m.H;
  return {image, begin, end, static_cast<int>(slot - row * m.across) * columns};
}

// A walk down some columns of an image: each call gives a row of packs and moves on to the next one.
template <int kCount, typename T>
struct Walk {
  Pointer<const T> row;
  int y, column;

  __device__ __forceinline__ Walk(const DepthwiseMap& m, Pointer<const T> image, int y_, int column_)
      : row(image + (int64_t(y_) * m.W + column_) * m.C), y(y_), column(column_) {}

  // Zero outside of the map; rows from `end` on are not read.
  __device__ __forceinline__ void get(const DepthwiseMap& m, int end, Pack<T, kPack> (&packs)[kCount]) {
    const bool there = y >= 0 && y < end;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      packs[i] = {};
      if (there && column + i >= 0 && column + i < m.W) packs[i] = get_pack<kPack, T>(row + int64_t(i) * m.C);
    }
    row = row + int64_t(m.W) * m.C, y++;
  }
};

// out = x + bias + convolution of x. Turned by 180 degrees and without bias, the kernel takes the output's gradient to x's.
template <typename T>
__global__ __launch_bounds__(kConvolveThreads, kConvolveBlocks) void convolve_kernel(
    const __grid_constant__ DepthwiseMap m, bool turned, Pointer<const T> x, Pointer<const float> weight,
    Pointer<const float> bias, Pointer<T> out) {
  auto& stage = shared_memory<SharedArray<Pack<float, kPack>, kTaps * 32>>();
  const int lane = threadIdx.x % m.lanes, group = threadIdx.x / m.lanes, groups = kConvolveThreads / m.lanes;
  const int first = blockIdx.x % m.tiles * m.lanes * kPack, channel = first + lane * kPack;
  const int slot = blockIdx.x / m.tiles * groups + group;
  const bool idle = slot >= m.slots || channel >= m.C;
  // The first rows are on their way while the weights are.
  const Strip s = strip_of(m, slot, kColumns);
  const int64_t offset = s.image * m.H * m.W * m.C + channel;
  const int end = idle ? 0 : s.end < m.H ? s.end + 1 : m.H;
  Walk<kColumns + 2, T> walk(m, x + offset, s.begin - 1, s.column - 1);
  Pack<T, kPack> ahead[kAhead<T>][kColumns + 2];
#pragma unroll
  for (int i = 0; i < kAhead<T>; i++) walk.get(m, end, ahead[i]);
  float w[kTaps][kPack], start[kPack];
#pragma unroll
  for (int j = 0; j < kPack; j++) start[j] = bias && !idle ? get<float>(bias + channel + j) : 0.0f;
  // A thread's 36 weights lie 144 bytes from its neighbour's: read together, they come in whole lines.
  constexpr int kEach = kTaps * kPack * 32 / kConvolveThreads;
  float staged[kEach];
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    const int i = threadIdx.x + k * kConvolveThreads, tap = i % kTaps, from = first * kTaps + i;
    const bool there = i < m.lanes * kPack * kTaps && from < m.C * kTaps;
    staged[k] = there ? get<float>(weight + from + (turned ? kTaps - 1 - 2 * tap : 0)) : 0.0f;
    // The residual goes into the middle tap: the sum is float32's, and so is the rounding.
    if (tap == kTaps / 2) staged[k] += 1.0f;
  }
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    const int i = threadIdx.x + k * kConvolveThreads;
    stage[i / kPack].x[i % kPack] = staged[k];
  }
  __syncthreads();
  if (idle) return;
#pragma unroll
  for (int i = 0; i < kPack * kTaps; i++) w[i % kTaps][i / kTaps] = stage[lane * kTaps + i / kPack].x[i % kPack];
  Pointer<T> out_row = out + (offset + (int64_t(s.begin) * m.W + s.column) * m.C);
  // Output rows that an input row has a part in: it is the first of three for the row below, the last for the row above.
  float sums[3][kColumns][kPack] = {};
#pragma unroll 1
  for (int top = s.begin - 1;; top += 3) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const int y = top + i;
      if (y > s.end) return;
      float in[kColumns + 2][kPack];
#pragma unroll
      for (int c = 0; c < kColumns + 2; c++) widen(ahead[i % kAhead<T>][c], in[c]);
      walk.get(m, end, ahead[i % kAhead<T>]);
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
#pragma unroll
        for (int j = 0; j < kPack; j++) {
          float &above = sums[(i + 2) % 3][c][j], &same = sums[i][c][j], &below = sums[(i + 1) % 3][c][j];
          below = start[j];
#pragma unroll
          for (int k = 0; k < 3; k++) {
            below += w[k][j] * in[c + k][j];
            same += w[3 + k][j] * in[c + k][j];
            above += w[6 + k][j] * in[c + k][j];
          }
        }
        if (y > s.begin && s.column + c < m.W) put_pack<kPack, T>(out_row + int64_t(c) * m.C, sums[(i + 2) % 3][c]);
      }
      if (y > s.begin) out_row = out_row + int64_t(m.W) * m.C;
    }
  }
}

// A strip's part in the gradients of the taps and the bias. A row of x meets those of the gradient above, beside and below
// it, of which the strip needs one column only.
template <typename T>
__device__ __forceinline__ void add_strip(
    const DepthwiseMap& m, const Strip& s, Pointer<const T> grad, Pointer<const T> x, float (&sums)[kSums][kPack]) {
  Walk<3, T> walk(m, x, s.begin, s.column - 1);
  Walk<1, T> grad_walk(m, grad, s.begin - 1, s.column);
  const int end = s.end < m.H ? s.end + 1 : m.H;
  Pack<T, kPack> ahead[kAhead<T>][3], grad_ahead[kAhead<T>][1];
  float g[3][kPack];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    grad_walk.get(m, end, grad_ahead[0]);
    widen(grad_ahead[0][0], g[i]);
  }
#pragma unroll
  for (int i = 0; i < kAhead<T>; i++) walk.get(m, s.end, ahead[i]), grad_walk.get(m, end, grad_ahead[i]);
#pragma unroll 1
  for (int y = s.begin;; y += 3) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      if (y + i >= s.end) return;
      float in[3][kPack];
#pragma unroll
      for (int c = 0; c < 3; c++) widen(ahead[i % kAhead<T>][c], in[c]);
      widen(grad_ahead[i % kAhead<T>][0], g[(i + 2) % 3]);
      walk.get(m, s.end, ahead[i % kAhead<T>]);
      grad_walk.get(m, end, grad_ahead[i % kAhead<T>]);
#pragma unroll
      for (int j = 0; j < kPack; j++) {
        sums[kTaps][j] += g[(i + 1) % 3][j];
#pragma unroll
        for (int k = 0; k < kTaps; k++) sums[k][j] += g[(i + 2 - k / 3) % 3][j] * in[k % 3][j];
      }
    }
  }
}

// Part `p` of the gradients of weight and bias, parts[p] of [parts, 10, C].
template <typename T>
__global__ __launch_bounds__(kGradThreads, kGradBlocks) void weight_grad_kernel(
    const __grid_constant__ DepthwiseMap m, Pointer<const T> grad, Pointer<const T> x, Pointer<float> parts) {
  const int lane = threadIdx.x % m.lanes, group = threadIdx.x / m.lanes, groups = kGradThreads / m.lanes;
  const int part = blockIdx.x / m.tiles, step = gridDim.x / m.tiles * groups;
  const int channel = static_cast<int>(blockIdx.x % m.tiles * m.lanes + lane) * kPack;
  float sums[kSums][kPack] = {};
  const int slots = channel < m.C ? m.slots : 0;
#pragma unroll 1
  for (int slot = part * groups + group; slot < slots; slot += step) {
    const Strip s = strip_of(m, slot, 1);
    const int64_t offset = s.image * m.H * m.W * m.C + channel;
    add_strip<T>(m, s, grad + offset, x + offset, sums);
  }
  sum_groups(m.lanes, sums);
  if (group > 0 || channel >= m.C) return;
#pragma unroll
  for (int k = 0; k < kSums; k++) put_pack<kPack, float>(parts + (int64_t(part) * kSums + k) * m.C + channel, sums[k]);
}

// Slots are counted in 32 bits, and steps from one to a later one: memory ends long before.
constexpr int64_t kMaxSlots = INT32_MAX / 2;

// The map's division into slots of so many columns.
inline DepthwiseMap make_map(int64_t B, int64_t H, int64_t W, int64_t C, int columns) {
  DepthwiseMap m = {};
  m.H = static_cast<int>(H), m.W = static_cast<int>(W), m.C = static_cast<int>(C);
  const int packs = m.C / kPack;
  // Fewer lanes leave fewer of them idle; eight still read whole sectors.
  m.lanes = 32;
  while (m.lanes > 8 && packs % m.lanes) m.lanes /= 2;
  m.tiles = (packs + m.lanes - 1) / m.lanes;
  m.strips = (m.H + kStripRows - 1) / kStripRows;
  m.rows = (m.H + m.strips - 1) / std::max(1, m.strips);
  m.across = (m.W + columns - 1) / columns;
  m.slots = B * m.strips * m.across;
  return m;
}

template <typename T>
cudaError_t run_convolve(
    int64_t B, int64_t H, int64_t W, int64_t C, bool turned, Pointer<const T> x, Pointer<const float> weight,
    Pointer<const float> bias, Pointer<T> out, cudaStream_t stream) {
  const DepthwiseMap m = make_map(B, H, W, C, kColumns);
  if (m.slots > kMaxSlots) return cudaErrorInvalidConfiguration;
  const int64_t groups = kConvolveThreads / m.lanes, blocks = (m.slots + groups - 1) / groups * m.tiles;
  return launch(convolve_kernel<T>, blocks, 1, 1, kConvolveThreads, stream, m, turned, x, weight, bias, out);
}

// Parts of the gradients of weight and bias: as many blocks as the device's `processors` hold at a time.
inline int64_t count_parts(const DepthwiseMap& m, int processors) {
  const int64_t groups = kGradThreads / m.lanes;
  return std::min<int64_t>((m.slots + groups - 1) / groups, std::max(1, kGradBlocks * processors / m.tiles));
}

// `take(count)` is memory for so many floats.
template <typename T, typename Take>
cudaError_t run_weight_grad(
    int64_t B, int64_t H, int64_t W, int64_t C, int processors, Pointer<const T> grad, Pointer<const T> x,
    Pointer<float> grad_weight, Pointer<float> grad_bias, cudaStream_t stream, const Take& take) {
  const DepthwiseMap m = make_map(B, H, W, C, 1);
  if (m.slots > kMaxSlots) return cudaErrorInvalidConfiguration;
  const int64_t count = count_parts(m, processors);
  const Pointer<float> parts = take(count * kSums * C);
  const cudaError_t error = launch(weight_grad_kernel<T>, count * m.tiles, 1, 1, kGradThreads, stream, m, grad, x, parts);
  if (error != cudaSuccess) return error;
  return run_sum_parts(m.C, kTaps, count, parts, grad_weight, grad_bias, stream);
}

}  // namespace dat
