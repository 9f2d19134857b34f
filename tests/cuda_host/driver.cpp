// Runs dat's CUDA kernels on the host for tests/ops/test_cuda_kernels_on_host.py, compiled once for each type of value.
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "calls.h"
// The stand-in for CUDA comes first.
#include "../../dat/csrc/cuda/launch.cuh"

namespace {

using T = DAT_VALUE_TYPE;
using Real = typename dat::RealOf<T>::type;

bool is_aligned(const Buffer& buffer) { return dat::aligned(static_cast<const char*>(buffer.data)); }

}  // namespace

// The same fields as in the test.
struct Call {
  int64_t B, S, H, D, Q, L, P;
  const int64_t* shapes;
  int64_t align_corners, narrow, boxes, deterministic, last_lane_first, max_batch, max_grid;
  // locations and weights, or reference, offsets and logits
  Buffer value, locations, weights, reference, offsets, logits;
  Buffer grad, out;
  Buffer grad_value, grad_locations, grad_weights, grad_reference, grad_offsets, grad_logits;
};

namespace {

dat::Geometry geometry_of(const Call& call) {
  std::vector<dat::Level> levels;
  int start = 0;
  for (int64_t l = 0; l < call.L; l++) {
    levels.push_back({static_cast<int>(call.shapes[2 * l]), static_cast<int>(call.shapes[2 * l + 1]), start});
    start += levels.back().height * levels.back().width;
  }
  return dat::make_geometry(call.B, call.H, call.D, call.Q, call.P, levels, call.align_corners);
}

void sum_by_value(const Call& call, const dat::Geometry& g, const dat::KeptInput<Real>& kept, bool row_per_sample) {
  std::vector<int> keys, sorted;
  std::vector<int64_t> order;
  const auto sort = [&](int64_t size, const auto& fill) {
    keys.assign(static_cast<size_t>(size), -1);
    fill(checked::Pointer<int>(keys.data(), size));
    order.resize(static_cast<size_t>(size));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return keys[static_cast<size_t>(a)] < keys[static_cast<size_t>(b)];
    });
    sorted.clear();
    for (int64_t i : order) sorted.push_back(keys[static_cast<size_t>(i)]);
    return dat::Order{checked::Pointer<const int>(sorted.data(), size), checked::Pointer<const int64_t>(order.data(), size)};
  };
  require(
      dat::run_deterministic<T, Real>(
          g, kept, row_per_sample, call.grad.as<const T>(), call.grad_value.as<Real>(), is_aligned(call.grad),
          call.max_batch, nullptr, sort));
}

template <template <typename> typename Source>
void points(const Call& call) {
  constexpr bool kLone = std::is_same_v<Source<dat::Rows<T, 8, 4, 1, true>>, dat::LonePoints<dat::Rows<T, 8, 4, 1, true>>>;
  const dat::Geometry g = geometry_of(call);
  const dat::PointsInput<Real> in = {call.locations.as<const Real>(), call.weights.as<const Real>()};
  if (!call.grad.data) {
    const bool aligned = is_aligned(call.value) && is_aligned(call.out);
    require(dat::run_forward<Source, T>(g, in, call.value.as<const T>(), call.out.as<T>(), aligned, nullptr));
    return;
  }
  Scratch<Real> pixels;
  const auto kept_pixels = pixels.take(call.deterministic, g.B * g.H * g.Q * g.samples() * 2);
  const dat::PointsGrads<Real> grads = {
      call.grad_locations.as<Real>(), call.grad_weights.as<Real>(), {kept_pixels, nullptr}};
  checked::Pointer<Real> sums = nullptr;
  if (!call.deterministic) sums = call.grad_value.as<Real>();
  require(
      dat::run_backward<Source, T, Real>(
          g, in, grads, call.grad.as<const T>(), call.value.as<const T>(), sums,
          is_aligned(call.value) && is_aligned(call.grad), nullptr));
  if (call.deterministic) sum_by_value(call, g, {kept_pixels, in.weights}, kLone);
}

dat::AttentionInput<Real> attention_input(const Call& call) {
  dat::AttentionInput<Real> in = {};
  in.reference = call.reference.as<const Real>();
  in.offsets = call.offsets.as<const char>(), in.logits = call.logits.as<const char>();
  in.narrow = call.narrow;
  in.boxes = call.boxes;
  in.box_share = Real(0.5) / static_cast<Real>(std::max<int64_t>(1, call.P));
  return in;
}

void attention_backward(const Call& call, const dat::Geometry& g, const dat::AttentionInput<Real>& in) {
  const int64_t samples = g.B * g.H * g.Q * g.samples();
  Scratch<Real> grad_weights, grad_pixels, pixels, weights;
  dat::AttentionGrads<Real> grads = {};
  grads.grad_offsets = call.grad_offsets.as<char>(), grads.grad_logits = call.grad_logits.as<char>();
  grads.grad_weights = call.narrow ? grad_weights.take(true, samples) : call.grad_logits.as<Real>();
  grads.grad_pixels = grad_pixels.take(call.grad_reference.data, samples * 2);
  grads.kept = {pixels.take(call.deterministic, samples * 2), weights.take(call.deterministic, samples)};
  checked::Pointer<Real> sums = nullptr;
  if (!call.deterministic) sums = call.grad_value.as<Real>();
  require(
      dat::run_backward<dat::Attention, T, Real>(
          g, in, grads, call.grad.as<const T>(), call.value.as<const T>(), sums,
          is_aligned(call.value) && is_aligned(call.grad), nullptr));
  if (call.grad_reference.data)
    require(dat::run_reference_grad<T, Real>(g, in, grads.grad_pixels, call.grad_reference.as<Real>(), nullptr));
  if (call.deterministic) sum_by_value(call, g, {grads.kept.pixels, grads.kept.weights}, false);
}

void attention(const Call& call) {
  const dat::Geometry g = geometry_of(call);
  const auto in = attention_input(call);
  if (call.grad.data) return attention_backward(call, g, in);
  const bool aligned = is_aligned(call.value) && is_aligned(call.out);
  require(dat::run_forward<dat::Attention, T>(g, in, call.value.as<const T>(), call.out.as<T>(), aligned, nullptr));
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* run(const Call* call) {
  emulator::last_lane_first = call->last_lane_first;
  emulator::max_grid = static_cast<unsigned>(call->max_grid);
  return error_of([&] {
    if (call->reference.data) {
      attention(*call);
    } else if (call->weights.data) {
      points<dat::WeightedPoints>(*call);
    } else {
      points<dat::LonePoints>(*call);
    }
  });
}
