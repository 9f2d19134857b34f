// Layer normalisation of rows of C channels, a multiple of four, or of the sums of two such rows, and its gradients. Each
// sum is in float32 and in a fixed order.
#pragma once

#include "channel_sums.cuh"

namespace dat {

constexpr int kNormLanes = 32, kNormPacks = 4;
// The most channels of a row: the sums of more would not fit into the registers.
constexpr int64_t kNormChannels = int64_t(kNormLanes) * kNormPacks * kPack;
// Blocks of the gradients' kernel that a multiprocessor holds at a time, if each thread has so many packs of a row.
constexpr int norm_grad_blocks(int packs) { return packs > 2 ? 1 : packs > 1 ? 2 : 4; }

// How threads share rows: `lanes` neighbouring threads have one, and each its packs of channels, `lanes` packs apart.
struct NormRows {
  int64_t rows;
  int C, lanes;
  float eps;
};

template <int kPacks>
using NormPart = float[kPacks][kPack];

// Channels from C on are zero.
template <typename T, int kPacks>
__device__ __forceinline__ void get_part(const NormRows& n, int channel, Pointer<const T> row, NormPart<kPacks>& x) {
#pragma unroll
  for (int i = 0; i < kPacks; i++, channel += n.lanes * kPack) {
    Pack<T, kPack> pack = {};
    if (channel < n.C) pack = get_pack<kPack, T>(row + channel);
    widen(pack, x[i]);
  }
}

template <typename T, int kPacks>
__device__ __forceinline__ void put_part(const NormRows& n, int channel, Pointer<T> row, const NormPart<kPacks>& x) {
#pragma unroll
  for (int i = 0; i < kPacks; i++, channel += n.lanes * kPack)
    if (channel < n.C) put_pack<kPack, T>(row + channel, x[i]);
}

// Calls call(i, j) for all channels of a thread.
template <int kPacks, typename Call>
__device__ __forceinline__ void for_part(const Call& call) {
#pragma unroll
  for (int i = 0; i < kPacks; i++)
#pragma unroll
    for (int j = 0; j < kPack; j++) call(i, j);
}

// The sum over the threads of a row, which all of them get.
__device__ __forceinline__ float sum_lanes(const NormRows& n, float sum) {
  for (int step = n.lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  return sum;
}

// Takes the mean from x; returns 1 / its standard deviation.
template <int kPacks>
__device__ __forceinline__ float center(const NormRows& n, int channel, NormPart<kPacks>& x) {
  float sum = 0.0f, squares = 0.0f;
  for_part<kPacks>([&](int i, int j) { sum += x[i][j]; });
  const float mean = sum_lanes(n, sum) / n.C;
  for_part<kPacks>([&](int i, int j) {
    x[i][j] = channel + i * n.lanes * kPack < n.C ? x[i][j] - mean : 0.0f;
    squares += x[i][j] * x[i][j];
  });
  return rsqrtf(sum_lanes(n, squares) / n.C + n.eps);
}

// out = norm(x), or, with a branch, norm(sum) of sum = x + branch.
template <int kPacks, typename X, typename Branch, typename Y>
__global__ __launch_bounds__(kGradThreads) void norm_kernel(
    const __grid_constant__ NormRows n, Pointer<const X> x, Pointer<const Branch> branch, Pointer<const float> weight,
    Pointer<const float> bias, Pointer<X> sum, Pointer<Y> out) {
  const int64_t row = int64_t(blockIdx.x) * (kGradThreads / n.lanes) + threadIdx.x / n.lanes, offset = row * n.C;
  const int channel = row < n.rows ? static_cast<int>(threadIdx.x % n.lanes) * kPack : n.C;
  NormPart<kPacks> part, other;
  get_part(n, channel, x + offset, part);
  if (branch) {
    get_part(n, channel, branch + offset, other);
    for_part<kPacks>([&](int i, int j) { part[i][j] += other[i][j]; });
    put_part(n, channel, sum + offset, part);
  }
  const float scale = center(n, channel, part);
  get_part(n, channel, weight, other);
  for_part<kPacks>([&](int i, int j) { part[i][j] *= scale * other[i][j]; });
  get_part(n, channel, bias, other);
  for_part<kPacks>([&](int i, int j) { part[i][j] += other[i][j]; });
  put_part(n, channel, out + offset, part);
}

// grad_x = grad_sum + the gradient of norm(x) by x; also in the dtype of the branch, if that is wanted. Block p sums its
// rows' gradients by weight and bias, parts[p] of [parts, 2, C].
template <int kPacks, typename X, typename Branch, typename Y>
__global__ __launch_bounds__(kGradThreads, norm_grad_blocks(kPacks)) void norm_grad_kernel(
    const __grid_constant__ NormRows n, Pointer<const Y> grad, Pointer<const X> grad_sum, Pointer<const X> x,
    Pointer<const float> weight, Pointer<X> grad_x, Pointer<Branch> grad_branch, Pointer<float> parts) {
  const int lane = threadIdx.x % n.lanes, group = threadIdx.x / n.lanes, groups = kGradThreads / n.lanes;
  NormPart<kPacks> w, x_hat, g, other;
  get_part(n, lane * kPack, weight, w);
  float sums[2 * kPacks][kPack] = {};
#pragma unroll 1
  for (int64_t first = int64_t(blockIdx.x) * groups; first < n.rows; first += int64_t(gridDim.x) * groups) {
    const int64_t row = first + group, offset = row * n.C;
    const int channel = row < n.rows ? lane * kPack : n.C;
    get_part(n, channel, x + offset, x_hat);
    get_part(n, channel, grad + offset, g);
    // On its way while the others are summed.
    get_part(n, grad_sum ? channel : n.C, grad_sum + offset, other);
    const float scale = center(n, channel, x_hat);
    float mean = 0.0f, slope = 0.0f;
    for_part<kPacks>([&](int i, int j) {
      // Where eps is 0, the scale of a row that does not exist is infinite.
      x_hat[i][j] = channel < n.C ? x_hat[i][j] * scale : 0.0f;
      sums[i][j] += g[i][j] * x_hat[i][j];
      sums[kPacks + i][j] += g[i][j];
      g[i][j] *= w[i][j];
      mean += g[i][j];
      slope += g[i][j] * x_hat[i][j];
    });
    mean = sum_lanes(n, mean) / n.C, slope = sum_lanes(n, slope) / n.C;
    for_part<kPacks>([&](int i, int j) { g[i][j] = other[i][j] + scale * (g[i][j] - mean - slope * x_hat[i][j]); });
    put_part(n, channel, grad_x + offset, g);
    if (grad_branch) put_part(n, channel, grad_branch + offset, g);
  }
  if (!parts) return;
  sum_groups(n.lanes, sums);
  if (group > 0) return;
  const Pointer<float> part = parts + int64_t(blockIdx.x) * 2 * n.C;
  for (int i = 0, channel = lane * kPack; i < kPacks && channel < n.C; i++, channel += n.lanes * kPack) {
    put_pack<kPack, float>(part + channel, sums[i]);
    put_pack<kPack, float>(part + n.C + channel, sums[kPacks + i]);
  }
}

inline NormRows make_rows(int64_t rows, int64_t C, double eps) {
  NormRows n = {rows, static_cast<int>(C), 1, static_cast<float>(eps)};
  while (n.lanes < kNormLanes && n.lanes * kPack < C) n.lanes *= 2;
  return n;
}

// Calls call(packs) with the packs of a thread as a constant.
template <typename Call>
cudaError_t with_packs(const NormRows& n, const Call& call) {
  const int packs = (n.C / kPack + n.lanes - 1) / n.lanes;
  if (packs <= 1) return call(std::integral_constant<int, 1>());
  if (packs <= 2) return call(std::integral_constant<int, 2>());
  return call(std::integral_constant<int, kNormPacks>());
}

template <typename X, typename Branch, typename Y>
cudaError_t run_norm(
    const NormRows& n, Pointer<const X> x, Pointer<const Branch> branch, Pointer<const float> weight,
    Pointer<const float> bias, Pointer<X> sum, Pointer<Y> out, cudaStream_t stream) {
  const int64_t groups = kGradThreads / n.lanes, blocks = (n.rows + groups - 1) / groups;
  return with_packs(n, [&](auto packs) {
    return launch(
        norm_kernel<packs, X, Branch, Y>, blocks, 1, 1, kGradThreads, stream, n, x, branch, weight, bias, sum, out);
  });
}

// `take(count)` is memory for so many floats. Without grad_weight there are no gradients of weight and bias.
template <typename X, typename Branch, typename Y, typename Take>
cudaError_t run_norm_grad(
    const NormRows& n, int processors, Pointer<const Y> grad, Pointer<const X> grad_sum, Pointer<const X> x,
    Pointer<const float> weight, Pointer<X> grad_x, Pointer<Branch> grad_branch, Pointer<float> grad_weight,
    Pointer<float> grad_bias, cudaStream_t stream, const Take& take) {
  const int64_t groups = kGradThreads / n.lanes;
  return with_packs(n, [&](auto packs) {
    const int64_t blocks =
        std::min<int64_t>((n.rows + groups - 1) / groups, int64_t(norm_grad_blocks(packs)) * std::max(1, processors));
    const Pointer<float> parts = grad_weight ? take(blocks * 2 * n.C) : nullptr;
    const cudaError_t error = launch(
        norm_grad_kernel<packs, X, Branch, Y>, blocks, 1, 1, kGradThreads, stream, n, grad, grad_sum, x, weight, grad_x,
        grad_branch, parts);
    if (error != cudaSuccess || !grad_weight) return error;
    return run_sum_parts(n.C, 1, blocks, parts, grad_weight, grad_bias, stream);
  });
}

}  // namespace dat
