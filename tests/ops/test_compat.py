"""The signatures of other libraries, and the real models of transformers, before and after the switch."""

import copy
import sys

import pytest
import torch
import transformers
from ops.samples import DTYPES, Sample, close
from torch import nn

from dat.ops import compat, reference

SHAPES = ((5, 7), (3, 1), (1, 1))
FUNCTIONS = ("multi_scale_deformable_attention", "multi_scale_deformable_attn_pytorch", "ms_deform_attn_core_pytorch")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def switch():
    """`compat.switch`, undone after the test: other tests want the library's own functions."""
    handles = []

    def switched(model):
        handles.append(compat.switch(model))
        return handles[-1]

    yield switched
    for handle in reversed(handles):
        handle.remove()


def inputs(dtype=torch.float32, **kwargs):
    """Value, tensor of shapes, level starts, locations and weights: what the other libraries pass."""
    value, locations, weights = Sample(dtype=dtype, shapes=SHAPES, **kwargs).tensors()
    areas = [h * w for h, w in SHAPES]
    starts = torch.tensor([0, *areas]).cumsum(0)[:-1]
    return value, torch.tensor(SHAPES), starts, locations, weights


def exact(value, locations, weights):
    """Output and gradients in float64, by the reference; the output's gradient counts from -1 to 1."""
    leaves = [t.detach().double().requires_grad_() for t in (value, locations, weights)]
    out = reference.deform_sample(leaves[0], SHAPES, *leaves[1:]).flatten(2)
    return out.detach(), torch.autograd.grad(out, leaves, counting(out), allow_unused=True, materialize_grads=True)


def counting(out):
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)


def as_function(name):
    def call(value, shapes, starts, locations, weights):
        return getattr(compat, name)(value, shapes, locations, weights)

    return call


def as_autograd_function(value, shapes, starts, locations, weights):
    return compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)


def as_kernel_layer(value, shapes, starts, locations, weights):
    layer = compat.MultiScaleDeformableAttention()
    return layer(value, shapes, [tuple(shape) for shape in shapes.tolist()], starts, locations, weights, 64)


class ExtensionFunction(torch.autograd.Function):
    """An autograd function on the two functions of the official extension, as every copy of the repository has one."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, step):
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return compat.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

    @staticmethod
    def backward(ctx, grad):
        grad_value, grad_locations, grad_weights = compat.ms_deform_attn_backward(*ctx.saved_tensors, grad, 64)
        return grad_value, None, None, grad_locations, grad_weights, None


def as_extension(value, shapes, starts, locations, weights):
    return ExtensionFunction.apply(value, shapes, starts, locations, weights, 64)


CALLS = {
    **{name: as_function(name) for name in FUNCTIONS},
    "MSDeformAttnFunction": as_autograd_function,
    "MultiScaleDeformableAttention": as_kernel_layer,
    "extension": as_extension,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 3])
def test_every_signature_equals_the_reference_in_float64(call, dtype, batch):
    value, shapes, starts, locations, weights = inputs(dtype, B=batch)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    out = call(value, shapes, starts, locations, weights)
    assert out.dtype == dtype
    assert out.shape == (batch, locations.shape[1], value.shape[2] * value.shape[3])
    want, want_grads = exact(value, locations, weights)
    close(out, want, TOLERANCE[dtype])
    for grad, leaf, want_grad in zip(torch.autograd.grad(out, leaves, counting(out)), leaves, want_grads, strict=True):
        assert grad.dtype == leaf.dtype
        close(grad, want_grad, TOLERANCE[dtype])


@every_call
def test_locations_in_half_precision_are_widened(call):
    value, shapes, starts, locations, weights = inputs(torch.float16)
    locations, weights = locations.half().requires_grad_(), weights.half()
    out = call(value, shapes, starts, locations, weights)
    want, want_grads = exact(value, locations, weights)
    close(out, want, TOLERANCE[torch.float16])
    (grad,) = torch.autograd.grad(out, locations, counting(out))
    assert grad.dtype == torch.float16
    close(grad, want_grads[1], TOLERANCE[torch.float16])


def test_names_of_mmcv_and_of_the_official_extension():
    assert compat.MultiScaleDeformableAttnFunction.apply is compat.MSDeformAttnFunction.apply
    sys.modules["MultiScaleDeformableAttention"] = compat
    try:
        import MultiScaleDeformableAttention as MSDA
    finally:
        del sys.modules["MultiScaleDeformableAttention"]
    value, shapes, starts, locations, weights = inputs()
    out = MSDA.ms_deform_attn_forward(value, shapes, starts, locations, weights, 2)
    close(out, exact(value, locations, weights)[0], TOLERANCE[torch.float32])


def test_the_extension_keeps_the_dtype_of_its_value_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert compat.ms_deform_attn_forward(*inputs(), 64).dtype == torch.float32


def test_compiled_code_has_the_dtype_of_eager_code_under_autocast():
    value, shapes, _, locations, weights = inputs()
    compiled = torch.compile(compat.multi_scale_deformable_attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [
            f(value, shapes, locations, weights).dtype for f in (compat.multi_scale_deformable_attention, compiled)
        ]
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_backward_of_the_extension_keeps_the_dtypes_of_its_arguments():
    value, shapes, starts, locations, weights = inputs(torch.bfloat16)
    tensors = (value, locations.half(), weights.double())
    grads = compat.ms_deform_attn_backward(value, shapes, starts, *tensors[1:], torch.ones(2, 5, 24), 64)
    assert [(grad.dtype, grad.shape) for grad in grads] == [(tensor.dtype, tensor.shape) for tensor in tensors]


def test_backward_of_the_extension_refuses_what_does_not_fit():
    value, shapes, starts, locations, weights = inputs()
    grad = torch.zeros(2, 5, 24)
    with pytest.raises(ValueError, match="locations must be"):
        compat.ms_deform_attn_backward(value, shapes, starts, locations[:1], weights, grad, 64)
    with pytest.raises(ValueError, match=r"as many \w+ as value has rows"):
        compat.ms_deform_attn_backward(value, shapes[:2], starts, locations, weights, grad, 64)


def test_levels_with_different_numbers_of_points():
    value, _, _, locations, weights = inputs(P=4)
    points = [4, 1, 3]
    kept = [(level, point) for level, n in enumerate(points) for point in range(n)]
    missing = torch.ones(3, 4, dtype=torch.bool)
    missing[tuple(zip(*kept, strict=True))] = False
    want, want_grads = exact(value, locations, weights.masked_fill(missing, 0))

    flat = [t.flatten(3, 4)[:, :, :, ~missing.flatten()].requires_grad_() for t in (locations, weights)]
    out = compat.multi_scale_deformable_attention_v2(value, SHAPES, *flat, points)
    close(out, want, TOLERANCE[torch.float32])
    grads = torch.autograd.grad(out, flat, counting(out))
    for grad, want_grad in zip(grads, want_grads[1:], strict=True):
        close(grad, want_grad.flatten(3, 4)[:, :, :, ~missing.flatten()], TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match="'default', bilinear sampling, got 'discrete'"):
        compat.multi_scale_deformable_attention_v2(value, SHAPES, *flat, points, "discrete")


class Remote(torch.Tensor):
    """A tensor that claims to be on a device, and counts how often it is waited for."""

    is_cpu = False
    waits = 0

    def tolist(self):
        Remote.waits += 1
        return self.as_subclass(torch.Tensor).tolist()


def test_shapes_on_a_device_are_waited_for_once_until_they_change():
    value, shapes, starts, locations, weights = inputs()
    remote = shapes.clone().as_subclass(Remote)
    Remote.waits = 0
    first = as_autograd_function(value, remote, starts, locations, weights)
    assert torch.equal(as_autograd_function(value, remote, starts, locations, weights), first)
    assert Remote.waits == 1
    remote[0] = torch.tensor((7, 5))
    changed = as_autograd_function(value, remote, starts, locations, weights)
    assert Remote.waits == 2
    assert torch.equal(changed, as_autograd_function(value, [[7, 5], *SHAPES[1:]], starts, locations, weights))
    with torch.inference_mode():
        uncounted = shapes.clone().as_subclass(Remote)
        as_autograd_function(value, uncounted, starts, locations, weights)
        uncounted[0] = torch.tensor((7, 5))
        assert torch.equal(as_autograd_function(value, uncounted, starts, locations, weights), changed)


@pytest.mark.parametrize("call", [as_function(FUNCTIONS[0]), as_autograd_function, as_extension])
def test_a_tensor_of_shapes_compiles_without_graph_breaks(call):
    value, shapes, starts, locations, weights = inputs()
    leaves = [t.requires_grad_() for t in (value, locations, weights)]

    def both(call):
        out = call(value, shapes, starts, locations, weights)
        return out, *torch.autograd.grad(out, leaves, counting(out))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(both(compiled), both(call), strict=True):
        torch.testing.assert_close(ours, eager)


def test_compiled_code_reads_the_sizes_when_it_runs():
    value, shapes, starts, locations, weights = inputs()
    compiled = torch.compile(as_autograd_function, fullgraph=True, backend="aot_eager")
    compiled(value, shapes, starts, locations, weights)
    other = torch.tensor([(7, 5), *SHAPES[1:]])
    with torch.compiler.set_stance("fail_on_recompile"):
        out = compiled(value, other, starts, locations, weights)
    assert torch.equal(out, as_autograd_function(value, other, starts, locations, weights))


def test_a_tensor_of_shapes_exports():
    class Layer(nn.Module):
        def forward(self, *args):
            return as_autograd_function(*args)

    arguments = inputs()
    program = torch.export.export(Layer(), arguments)
    assert torch.equal(program.module()(*arguments), as_autograd_function(*arguments))


def test_opcheck():
    value, shapes, _, locations, weights = inputs()
    leaves = [t.requires_grad_() for t in (locations, weights)]
    torch.library.opcheck(torch.ops.dat.compat_sample, (value.requires_grad_(), shapes, *leaves))
    detached = [t.detach() for t in (torch.randn(2, 5, 24), value, shapes, locations, weights)]
    torch.library.opcheck(torch.ops.dat.compat_sample_backward, tuple(detached))


def resnet(cls=transformers.ResNetConfig):
    return cls(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )


def swin():
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_indices=[1, 2, 3, 4]
    )


DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 12,
    "num_labels": 5,
}
RT_DETR = {
    **DETR,
    "encoder_layers": 1,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32] * 3,
    "num_denoising": 0,
}


def deformable_detr(**kwargs):
    config = transformers.DeformableDetrConfig(backbone_config=resnet(), two_stage_num_proposals=12, **DETR, **kwargs)
    return transformers.DeformableDetrForObjectDetection(config)


def two_stage_deformable_detr():
    return deformable_detr(two_stage=True, with_box_refine=True)


def rt_detr():
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(backbone_config=resnet(transformers.RTDetrResNetConfig), **RT_DETR)
    )


def rt_detr_v2(**kwargs):
    return transformers.RTDetrV2ForObjectDetection(
        transformers.RTDetrV2Config(backbone_config=resnet(transformers.RTDetrResNetConfig), **RT_DETR, **kwargs)
    )


def d_fine(**kwargs):
    return transformers.DFineForObjectDetection(
        transformers.DFineConfig(
            backbone_config=resnet(transformers.RTDetrResNetConfig), decoder_n_points=[3, 6, 2], **RT_DETR, **kwargs
        )
    )


def mask2former():
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=swin(),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=2,
            decoder_layers=3,
            num_attention_heads=4,
            num_queries=12,
        )
    )


def grounding_dino():
    text = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    backbone = swin()
    backbone.set_output_features_output_indices(out_indices=[2, 3, 4], out_features=None)
    config = transformers.GroundingDinoConfig(backbone_config=backbone, text_config=text, **DETR)
    return transformers.GroundingDinoForObjectDetection(config)


MODELS = [deformable_detr, two_stage_deformable_detr, rt_detr, rt_detr_v2, d_fine, mask2former, grounding_dino]
every_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def ready(build, dtype=torch.float32):
    """The model as after training: features that do not vanish, offsets of some pixels, boxes that differ."""
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 if "sampling_offsets" in name else module.in_features**-0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


def images(model):
    """Two images, the second with padding on the right and below, and words for a model that reads."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 96, 128, generator=generator)
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 70:], mask[1, :, 90:] = 0, 0
    words = {"input_ids": torch.tensor([[2, 7, 9, 4, 3]] * 2)} if "grounding" in model.config.model_type else {}
    return {"pixel_values": (pixels * mask[:, None]).to(model.dtype), "pixel_mask": mask, **words}


def predictions(model):
    out = model(**images(model))
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    # Grounding DINO's logits of words that are not there are minus infinity.
    return {name: out[name].nan_to_num(neginf=0) for name in names if name in out}


def gradients(model):
    """Of a sum of the predictions, by every parameter."""
    total = sum((tensor * counting(tensor)).sum() for tensor in predictions(model).values())
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(total, parameters.values(), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def worst(ours, exact):
    """Largest difference of any tensor, relative to the tensor's largest element."""
    return max(((ours[name] - t).abs().max() / t.abs().max().clamp(min=1e-4)).item() for name, t in exact.items())


@every_model
def test_a_switched_model_predicts_the_same(build, switch, monkeypatch):
    model = ready(build)
    before = predictions(model)
    switch(model)
    assert worst(predictions(model), before) < 1e-5

    sample, factors = compat.deform_sample, []
    monkeypatch.setattr(compat, "deform_sample", lambda *args: sample(*args) * (factors.append(0.0) or 0.0))
    assert worst(predictions(model), before) > 1e-2
    assert len(factors) == sum(name.endswith("sampling_offsets") for name, _ in model.named_modules())


@every_model
def test_a_switched_model_has_the_same_gradients_until_it_is_put_back(build, switch, monkeypatch):
    model = ready(build, torch.float64)
    before = gradients(model)
    handle = switch(model)
    assert worst(gradients(model), before) < 1e-7
    handle.remove()
    monkeypatch.delattr(compat, "deform_sample")
    assert worst(gradients(model), before) == 0


def test_a_switched_layer_compiles_without_graph_breaks(switch):
    model = ready(deformable_detr)
    switch(model)
    layer = model.model.encoder.layers[0].self_attn
    states, points = torch.randn(2, 39, 32), torch.rand(2, 39, 4, 2)
    sizes = [(5, 7), (3, 1), (1, 1), (0, 1)]

    def call(function):
        return function(
            states,
            encoder_hidden_states=states,
            reference_points=points,
            spatial_shapes=torch.tensor(sizes),
            spatial_shapes_list=sizes,
        )[0]

    torch.testing.assert_close(call(torch.compile(layer, fullgraph=True, backend="aot_eager")), call(layer))


def test_copies_of_a_switched_model_are_switched(switch):
    model = ready(deformable_detr)
    switch(model)
    copied = copy.deepcopy(model)
    layers = [module.forward for module in copied.modules() if type(module).__name__ == "MultiScaleDeformableAttention"]
    assert len(layers) == 4
    assert all(forward.__func__ is compat.MultiScaleDeformableAttention.forward for forward in layers)
    assert all(forward.__self__ in set(copied.modules()) for forward in layers)


class Decorated(nn.Module):
    """A module as mmcv has them: decorated, with one name for GPUs and another for CPUs."""

    @torch.no_grad()
    def forward(self, value, shapes, starts, locations, weights):
        if value.is_cuda:
            return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def multi_scale_deformable_attn_pytorch(value, shapes, locations, weights):
    raise AssertionError("the library's own function")


class MultiScaleDeformableAttnFunction(torch.autograd.Function):
    pass


def test_names_are_replaced_where_a_module_looks_them_up(switch):
    own, arguments = multi_scale_deformable_attn_pytorch, inputs()
    handle = switch(nn.Sequential(Decorated()))
    assert MultiScaleDeformableAttnFunction is compat.MSDeformAttnFunction
    assert torch.equal(Decorated()(*arguments), as_autograd_function(*arguments))
    handle.remove()
    assert multi_scale_deformable_attn_pytorch is own
    assert issubclass(MultiScaleDeformableAttnFunction, torch.autograd.Function)


class HeadsFirst(nn.Module):
    """A module as in RF-DETR and in exported LW-DETR: heads before channels, weights of all levels in one dimension."""

    def __init__(self, given_twice):
        super().__init__()
        self.given_twice = given_twice

    def forward(self, value, shapes, locations, weights):
        value = value.permute(0, 2, 3, 1).contiguous()
        extra = {"value_spatial_shapes_hw": shapes.tolist()} if self.given_twice else {}
        return ms_deform_attn_core_pytorch(value, shapes, locations, weights.flatten(3), **extra)


def ms_deform_attn_core_pytorch(value, shapes, locations, weights, value_spatial_shapes_hw=None):
    raise AssertionError("the library's own function")


@pytest.mark.parametrize("given_twice", [False, True])
@pytest.mark.parametrize("heads", [3, 39])
def test_heads_before_channels_are_recognised(switch, given_twice, heads):
    """Also where there are as many heads as rows of values, so that sizes do not tell the layouts apart."""
    value, shapes, starts, locations, weights = inputs(H=heads)
    assert value.shape[1] == 39
    layer = HeadsFirst(given_twice)
    switch(layer)
    out = layer(value, shapes, locations, weights)
    close(out, exact(value, locations, weights)[0], TOLERANCE[torch.float32])
    assert torch.equal(out, as_autograd_function(value, shapes, starts, locations, weights))


class MSDeformAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step, prior):
        raise AssertionError("the library's own function")


class OtherArguments(nn.Module):
    def forward(self, *args):
        return MSDeformAttnFunction.apply(*args)


def test_a_known_name_with_other_arguments_is_refused():
    message = r"model must call MSDeformAttnFunction with the arguments \(value, .*\), got OtherArguments, .* prior\)"
    with pytest.raises(ValueError, match=message):
        compat.switch(OtherArguments())


class Method(nn.Module):
    """A module whose own method happens to have a name that `switch` knows."""

    def multi_scale_deformable_attention(self, value):
        return value

    def forward(self, value):
        return self.multi_scale_deformable_attention(value)


def test_a_model_that_cannot_be_switched_is_refused():
    for model in (nn.Linear(1, 1), Method()):
        message = rf"must hold .* attention that dat\.ops\.compat supports, got {type(model).__name__}"
        with pytest.raises(ValueError, match=message):
            compat.switch(model)
    for build in (rt_detr_v2, d_fine):
        with pytest.raises(ValueError, match=r"must sample bilinearly, got .* with method 'discrete'"):
            compat.switch(build(decoder_method="discrete"))
