// Registers ms_deform_attn for CUDA tensors.
#include "ms_deform_attn.h"

namespace dat {
namespace {

Tensor forward(Tensor value, Tensor reference, Tensor offsets, Tensor logits, std::vector<int64_t> shapes) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const AttentionArguments args(value, reference, offsets, logits, shapes);
  const Geometry& g = args.geometry;
  Tensor out = empty(value, {g.B, g.Q, g.H, g.D});
  with_type(kMSDeformAttn, value, [&]<typename T>(T) {
    const auto in = args.input<typename RealOf<T>::type>();
    const bool wide = aligned(args.value) && aligned(out);
    check_launch(
        kMSDeformAttn, value,
        run_forward<Attention, T>(g, in, data<T>(args.value), mutable_data<T>(out), wide, current_stream(value)));
  });
  return out;
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY_IMPL(dat, CUDA, m) { m.impl("ms_deform_attn", TORCH_BOX(&dat::forward)); }
