// deform_sample and its backward for CUDA tensors.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../bilinear.h"

namespace dat {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kMaxLevels = 64;

// A row is what one group of lanes works on: the L * P samples of a head whose weighted sum is one row of the output or,
// without weights, a single sample.
struct Geometry {
  Level levels[kMaxLevels];
  int64_t S, H, D, Q, L, P;
  int64_t rows;
  int samples_per_row;
  int lanes;
  bool align_corners;
};

// torch compiles without the implicit conversions of half types.
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T x[kWidth];
};

template <typename Real>
struct Sample {
  Axis<Real, int> x, y;
  int64_t rows[4];
};

// Sample k of all: where it falls, and the element offsets of its four corner rows in `value`.
template <typename Real>
__device__ __forceinline__ Sample<Real> locate(const Geometry& g, const Real* locations, int64_t k) {
  const int64_t head = k / (g.L * g.P);
  const Level level = g.levels[k / g.P % g.L];
  Sample<Real> s;
  s.x = interpolate<Scalar<Real>>(locations[2 * k], level.width, g.align_corners);
  s.y = interpolate<Scalar<Real>>(locations[2 * k + 1], level.height, g.align_corners);
  const int64_t stride = g.H * g.D, origin = head / (g.Q * g.H) * g.S + level.start;
  const int64_t low = origin + int64_t(s.y.low) * level.width, high = origin + int64_t(s.y.high) * level.width;
  const int64_t channel = head % g.H * g.D;
  s.rows[0] = (low + s.x.low) * stride + channel, s.rows[1] = (low + s.x.high) * stride + channel;
  s.rows[2] = (high + s.x.low) * stride + channel, s.rows[3] = (high + s.x.high) * stride + channel;
  return s;
}

template <typename Real>
__device__ __forceinline__ void corner_weights(const Sample<Real>& s, Real weight, Real (&corners)[4]) {
  const Real low = weight * s.y.low_weight, high = weight * s.y.high_weight;
  corners[0] = low * s.x.low_weight, corners[1] = low * s.x.high_weight;
  corners[2] = high * s.x.low_weight, corners[3] = high * s.x.high_weight;
}

template <typename T, typename Real, int kWidth>
__global__ __launch_bounds__(kThreads) void forward_kernel(
    const __grid_constant__ Geometry g, const T* __restrict__ value, const Real* __restrict__ locations,
    const Real* __restrict__ weights, T* __restrict__ out) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / g.lanes;
  const int lane = threadIdx.x % g.lanes;
  if (row >= g.rows) return;
  for (int64_t d = lane * kWidth; d < g.D; d += g.lanes * kWidth) {
    Real sum[kWidth] = {};
    for (int i = 0; i < g.samples_per_row; i++) {
      const int64_t k = row * g.samples_per_row + i;
      const Sample<Real> s = locate(g, locations, k);
      if (!(s.x.inside && s.y.inside)) continue;
      Real corners[4];
      corner_weights(s, weights ? weights[k] : Real(1), corners);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(value + s.rows[c] + d);
#pragma unroll
        for (int j = 0; j < kWidth; j++) sum[j] += corners[c] * widen(pack.x[j]);
      }
    }
    Pack<T, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; j++) narrow(sum[j], pack.x[j]);
    *reinterpret_cast<Pack<T, kWidth>*>(out + row * g.D + d) = pack;
  }
}

template <typename T, typename Real, int kWidth>
__global__ __launch_bounds__(kThreads) void backward_kernel(
    const __grid_constant__ Geometry g, const T* __restrict__ grad, const T* __restrict__ value,
    const Real* __restrict__ locations, const Real* __restrict__ weights, Real* __restrict__ by_value,
    Real* __restrict__ by_locations, Real* __restrict__ by_weights) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / g.lanes;
  const int lane = threadIdx.x % g.lanes;
  // Every lane of the warp takes part in the shuffles below, so that rows past the end only skip the memory accesses.
  const bool active = row < g.rows;
  for (int i = 0; i < g.samples_per_row; i++) {
    const int64_t k = active ? row * g.samples_per_row + i : 0;
    const Sample<Real> s = locate(g, locations, k);
    const Real weight = weights ? weights[k] : Real(1);
    Real dot[4] = {};
    if (active && s.x.inside && s.y.inside) {
      Real corners[4];
      corner_weights(s, weight, corners);
      for (int64_t d = lane * kWidth; d < g.D; d += g.lanes * kWidth) {
        const auto out = *reinterpret_cast<const Pack<T, kWidth>*>(grad + row * g.D + d);
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(value + s.rows[c] + d);
#pragma unroll
          for (int j = 0; j < kWidth; j++) {
            dot[c] += widen(pack.x[j]) * widen(out.x[j]);
            if (corners[c] != Real(0)) atomicAdd(by_value + s.rows[c] + d + j, corners[c] * widen(out.x[j]));
          }
        }
      }
    }
    for (int step = g.lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int c = 0; c < 4; c++) dot[c] += __shfl_xor_sync(0xffffffffu, dot[c], step);
    }
    if (active && lane == 0) {
      SampleGrad<Real> by = {0, 0, 0};
      if (s.x.inside && s.y.inside) by = sample_grad(s.x, s.y, dot);
      by_locations[2 * k] = weight * by.x;
      by_locations[2 * k + 1] = weight * by.y;
      if (weights) by_weights[k] = by.weight;
    }
  }
}

Geometry make_geometry(
    const Tensor& value, const Tensor& locations, bool weighted, const std::vector<int64_t>& shapes, bool align_corners) {
  Geometry g;
  g.S = value.size(1), g.H = value.size(2), g.D = value.size(3);
  g.Q = locations.size(1), g.L = static_cast<int64_t>(shapes.size() / 2), g.P = locations.size(4);
  STD_TORCH_CHECK(g.L <= kMaxLevels, "deform_sample: at most ", kMaxLevels, " levels on a CUDA device, got ", g.L);
  STD_TORCH_CHECK(g.S < INT32_MAX, "deform_sample: the levels must have fewer than 2**31 cells, got ", g.S);
  int64_t start = 0;
  for (int64_t l = 0; l < g.L; l++) {
    g.levels[l] = {static_cast<int>(shapes[2 * l]), static_cast<int>(shapes[2 * l + 1]), static_cast<int>(start)};
    start += shapes[2 * l] * shapes[2 * l + 1];
  }
  STD_TORCH_CHECK(start == g.S, "deform_sample: shapes must have S = ", g.S, " cells, got ", start);
  const int64_t heads = value.size(0) * g.Q * g.H;
  g.samples_per_row = weighted ? static_cast<int>(g.L * g.P) : 1;
  g.rows = weighted ? heads : heads * g.L * g.P;
  g.align_corners = align_corners;
  return g;
}

void set_lanes(Geometry& g, int width) {
  g.lanes = 1;
  while (g.lanes < 32 && g.lanes * width < g.D) g.lanes *= 2;
}

unsigned blocks(const Geometry& g) {
  const int64_t count = (g.rows * g.lanes + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(count <= INT32_MAX, "deform_sample: too many samples for one launch: ", g.rows, " rows of ", g.D);
  return static_cast<unsigned>(count);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const Tensor& tensor) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  cudaDeviceProp device = {};
  cudaGetDeviceProperties(&device, tensor.get_device_index());
  STD_TORCH_CHECK(
      false, "deform_sample did not launch on ", device.name, ": ", cudaGetErrorString(error), " (dat was built for ",
      DAT_CUDA_ARCHITECTURES, "; this device needs ", device.major, ".", device.minor, ")");
}

template <typename T, typename Real, int kWidth>
void launch_forward(
    Geometry g, const Tensor& value, const Tensor& locations, const std::optional<Tensor>& weights, Tensor& out) {
  set_lanes(g, kWidth);
  forward_kernel<T, Real, kWidth><<<blocks(g), kThreads, 0, current_stream(value)>>>(
      g, static_cast<const T*>(value.const_data_ptr()), static_cast<const Real*>(locations.const_data_ptr()),
      weights ? static_cast<const Real*>(weights->const_data_ptr()) : nullptr, static_cast<T*>(out.mutable_data_ptr()));
  check_launch(value);
}

template <typename T, typename Real, int kWidth>
void launch_backward(
    Geometry g, const Tensor& grad, const Tensor& value, const Tensor& locations, const std::optional<Tensor>& weights,
    Tensor& by_value, Tensor& by_locations, Tensor& by_weights) {
  set_lanes(g, kWidth);
  backward_kernel<T, Real, kWidth><<<blocks(g), kThreads, 0, current_stream(value)>>>(
      g, static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(value.const_data_ptr()),
      static_cast<const Real*>(locations.const_data_ptr()),
      weights ? static_cast<const Real*>(weights->const_data_ptr()) : nullptr,
      static_cast<Real*>(by_value.mutable_data_ptr()), static_cast<Real*>(by_locations.mutable_data_ptr()),
      static_cast<Real*>(by_weights.mutable_data_ptr()));
  check_launch(value);
}

// Calls f<T, Real, width>() for the dtype of `value`; four channels at a time where rows and storage are aligned for that.
template <typename F>
void dispatch(const Tensor& value, bool wide, const F& f) {
  switch (value.scalar_type()) {
    case ScalarType::Float:
      return wide ? f.template operator()<float, float, 4>() : f.template operator()<float, float, 1>();
    case ScalarType::Double: return f.template operator()<double, double, 1>();
    case ScalarType::BFloat16:
      return wide ? f.template operator()<__nv_bfloat16, float, 4>() : f.template operator()<__nv_bfloat16, float, 1>();
    case ScalarType::Half:
      return wide ? f.template operator()<__half, float, 4>() : f.template operator()<__half, float, 1>();
    default: STD_TORCH_CHECK(false, "deform_sample: value must be float32, float64, bfloat16 or float16");
  }
}

bool wide_rows(const Tensor& value, const void* other) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return value.size(3) % 4 == 0 && aligned(value.const_data_ptr()) && aligned(other);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

void check_real(const Tensor& value, const Tensor& locations, const std::optional<Tensor>& weights) {
  const ScalarType real = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      locations.scalar_type() == real && (!weights || weights->scalar_type() == real),
      "deform_sample: locations and weights must be float64 for float64 values, else float32");
}

Tensor forward(
    Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes, bool align_corners) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  check_real(value, locations, weights);
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = contiguous(weights);
  const Geometry g = make_geometry(value, locations, weights.has_value(), shapes, align_corners);
  std::vector<int64_t> size = {value.size(0), g.Q, g.H};
  if (!weights) size.insert(size.end(), {g.L, g.P});
  size.push_back(g.D);
  Tensor out = torch::stable::new_empty(value, size);
  if (g.rows == 0 || g.D == 0) return out;
  dispatch(value, wide_rows(value, out.const_data_ptr()), [&]<typename T, typename Real, int kWidth>() {
    launch_forward<T, Real, kWidth>(g, value, locations, weights, out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor value, Tensor locations, std::optional<Tensor> weights, std::vector<int64_t> shapes,
    bool align_corners, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  check_real(value, locations, weights);
  grad = torch::stable::contiguous(grad);
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = contiguous(weights);
  const Geometry g = make_geometry(value, locations, weights.has_value(), shapes, align_corners);
  Tensor by_value = torch::stable::new_zeros(value, value.sizes(), locations.scalar_type());
  Tensor by_locations = torch::stable::empty_like(locations);
  Tensor by_weights = weights ? torch::stable::empty_like(*weights) : torch::stable::new_empty(locations, {0});
  if (g.rows > 0) {
    dispatch(value, wide_rows(value, grad.const_data_ptr()), [&]<typename T, typename Real, int kWidth>() {
      launch_backward<T, Real, kWidth>(g, grad, value, locations, weights, by_value, by_locations, by_weights);
    });
  }
  if (by_value.scalar_type() != value.scalar_type()) by_value = torch::stable::to(by_value, value.scalar_type());
  return {by_value, by_locations, by_weights};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) {
  m.impl("deform_sample", TORCH_BOX(&dat::forward));
  m.impl("deform_sample_backward", TORCH_BOX(&dat::backward));
}
