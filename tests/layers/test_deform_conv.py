from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch._dynamo.testing import CompileCounterWithBackend

from dat.layers import DeformConv2d, deform_conv2d

# In float32 both have errors of sums of thousands, which depend on the processor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@dataclass(frozen=True)
class Case:
    """Inputs of a deformable convolution; `spread` is the size of the offsets, in pixels."""

    name: str
    B: int = 2
    channels: tuple[int, int] = (6, 4)
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    spread: float = 2.0

    def kwargs(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, dtype=torch.float32, seed=0):
        """input, offset, weight, bias and mask."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        (C, O_), taps = self.channels, self.kernel[0] * self.kernel[1] * self.offset_groups
        steps = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps]
        return (
            normal(self.B, C, *self.size),
            normal(self.B, 2 * taps, *out) * self.spread,
            normal(O_, C // self.groups, *self.kernel),
            normal(O_),
            normal(self.B, taps, *out).sigmoid(),
        )


CASES = [
    Case("plain"),
    Case("bottleneck", channels=(16, 24), size=(13, 17)),
    Case("groups", groups=2),
    Case("depthwise", channels=(6, 12), groups=6),
    Case("offset groups", offset_groups=3),
    Case("groups across offset groups", channels=(12, 8), groups=4, offset_groups=6),
    Case("stride", stride=(2, 3), padding=(0, 2)),
    Case("dilation", size=(11, 10), dilation=(2, 3), padding=(2, 1)),
    Case("wide kernel", kernel=(1, 5), padding=(0, 3)),
    Case("tall kernel", kernel=(4, 1), padding=(2, 0), stride=(2, 1)),
    Case("one tap", kernel=(1, 1), padding=(0, 0)),
    Case("no tap moved", spread=0.0),
    Case("no tap moved, odd sizes", size=(49, 23), spread=0.0),
    Case("far outside", spread=30.0),
    Case("one row", size=(1, 8)),
    Case("one pixel", size=(1, 1)),
    Case("no image", B=0),
    Case("many images", B=33, size=(4, 5)),
    Case("large map", B=1, channels=(8, 3), size=(200, 272)),
]
GENERAL = Case("general", channels=(12, 8), size=(9, 8), stride=(2, 1), groups=2, offset_groups=3)


def results(function, case, tensors, masked):
    """Output, and gradients by all tensors, of a loss to which every element counts differently."""
    leaves = [t.detach().requires_grad_() for t in (tensors if masked else tensors[:4])]
    out = function(*leaves[:4], mask=leaves[4] if masked else None, **case.kwargs())
    grad = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        if b.numel():
            torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=tolerance * max(b.abs().max().item(), 1e-6))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_torchvision_in_value_and_gradients(case, masked, dtype):
    tensors = case.tensors(dtype)
    ours = results(deform_conv2d, case, tensors, masked)
    theirs = results(torchvision.ops.deform_conv2d, case, tensors, masked)
    close(ours, theirs, TOLERANCE[dtype])


def test_takes_tensors_of_any_strides():
    tensors = GENERAL.tensors(torch.float64)
    spread = [t.transpose(-1, 0).contiguous().transpose(-1, 0).repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert not any(t.is_contiguous() for t in spread)
    close(results(deform_conv2d, GENERAL, spread, True), results(deform_conv2d, GENERAL, tensors, True), 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_keeps_the_memory_format_of_its_input(groups):
    layer = DeformConv2d(6, 4, 3, padding=1, groups=groups)
    input, offset, _, _, mask = Case("plain").tensors()
    assert layer(input, offset, mask).is_contiguous()
    last = layer(input.to(memory_format=torch.channels_last), offset, mask)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(input, offset, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_locations(dtype):
    """Offsets of 60 pixels are a quarter of a pixel apart in bfloat16, so that sums in it would be wrong."""
    case = Case("shifted", size=(80, 80), spread=0.0)
    input, offset, weight, bias, mask = (t.to(dtype) for t in case.tensors())
    offset = offset + torch.tensor([60.25, -60.25]).repeat(9)[:, None, None]
    expected = torchvision.ops.deform_conv2d(
        input.double(), offset.double(), weight.double(), bias.double(), mask=mask.double(), **case.kwargs()
    )
    for moves in (offset, offset.to(dtype)):
        exact = expected if moves is offset else None
        if exact is None:
            exact = torchvision.ops.deform_conv2d(
                input.double(), moves.double(), weight.double(), bias.double(), mask=mask.double(), **case.kwargs()
            )
        out = deform_conv2d(input, moves, weight, bias, mask=mask, **case.kwargs())
        assert out.dtype == dtype
        close([out], [exact], 1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32_as_torchvision_does(dtype):
    def under_autocast(function):
        return torch.autocast("cpu", dtype)(function)

    tensors = GENERAL.tensors()
    exact = results(deform_conv2d, GENERAL, tensors, True)
    ours = results(under_autocast(deform_conv2d), GENERAL, tensors, True)
    theirs = results(under_autocast(torchvision.ops.deform_conv2d), GENERAL, tensors, True)
    input, offset, weight, bias, mask = (tensor.to(dtype) for tensor in tensors)
    low = under_autocast(deform_conv2d)(input, offset, weight, bias, mask=mask, **GENERAL.kwargs())
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    assert low.dtype == dtype
    close([low], [exact[0]], 2e-2)


def test_gradcheck_once_and_twice():
    case = Case("small", B=1, channels=(2, 2), size=(3, 4), kernel=(2, 1), padding=(0, 0), offset_groups=2)
    leaves = [t.requires_grad_() for t in case.tensors(torch.float64)]

    def function(input, offset, weight, bias, mask):
        return deform_conv2d(input, offset, weight, bias, mask=mask)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_offsets_that_are_not_numbers_sample_zero():
    case = Case("wild", size=(5, 5), spread=0.0)
    tensors = case.tensors()
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    tensors[1][:, 4:6, 2] = wild
    # The tap moved away has no part in the row: as if its mask were zero there.
    expected = [t.clone() for t in case.tensors()]
    expected[4][:, 2, 2] = 0
    ours, exact = results(deform_conv2d, case, tensors, True), results(deform_conv2d, case, expected, True)
    close([ours[0], ours[1], *ours[3:5]], [exact[0], exact[1], *exact[3:5]], 1e-6)
    assert not ours[2][:, 4:6, 2].any()
    assert not ours[5][:, 2, 2].any()


def test_keeps_no_samples_for_the_backward():
    kept = []
    tensors = [t.requires_grad_() for t in Case("plain").tensors()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = deform_conv2d(*tensors[:4], padding=1, mask=tensors[4])
    assert out.requires_grad
    assert sum(kept) <= sum(t.numel() for t in tensors)


def test_compiles_whole_forward_and_backward():
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
    tensors = GENERAL.tensors()
    close(results(compiled, GENERAL, tensors, True), results(deform_conv2d, GENERAL, tensors, True), 1e-6)


def test_compiles_once_for_every_size():
    counter = CompileCounterWithBackend("eager")
    layer = DeformConv2d(8, 6, 3, padding=1, groups=2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    # With no tap moved, a rounded location would show in the gradient by the offset.
    for B, size, spread in ((2, (9, 11), 2.0), (3, (12, 35), 2.0), (4, (49, 23), 0.0)):
        tensors = Case("dynamic", B=B, channels=(8, 6), size=size, offset_groups=4, spread=spread).tensors()
        gradients = []
        for module in (compiled, layer):
            leaves = [tensors[i].detach().requires_grad_() for i in (0, 1, 4)]
            out = module(*leaves)
            gradients.append([out.detach(), *torch.autograd.grad(out.cos().sum(), [*leaves, *layer.parameters()])])
        close(*gradients, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_batch_and_size(strict):
    layer = DeformConv2d(6, 4, 3, padding=1)
    inputs = [Case("export", B=B, size=size).tensors() for B, size in ((2, (7, 9)), (3, (12, 31)))]
    first, second = ((input, offset, mask) for input, offset, _, _, mask in inputs)
    axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    exported = torch.export.export(layer, first, dynamic_shapes=(axes, axes, axes), strict=strict)
    torch.testing.assert_close(exported.module()(*second), layer(*second), rtol=0, atol=1e-5)


def test_starts_like_torchvisions_layer_and_takes_its_weights():
    layers = []
    for make in (DeformConv2d, torchvision.ops.DeformConv2d):
        torch.manual_seed(0)
        layers.append(make(6, 4, (3, 2), (1, 2), (1, 0), (2, 1), 2, True))
    ours, theirs = layers
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter), name
    ours.load_state_dict(theirs.double().state_dict())
    case = Case("layer", kernel=(3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2)
    input, offset, _, _, mask = case.tensors(torch.float64)
    torch.testing.assert_close(ours.double()(input, offset, mask), theirs(input, offset, mask), rtol=0, atol=1e-12)
    without = DeformConv2d(6, 4, 3, bias=False)
    assert without.bias is None
    assert list(without.state_dict()) == ["weight"]


INPUT, OFFSET, WEIGHT, BIAS, MASK = Case("errors", offset_groups=2).tensors()


@pytest.mark.parametrize(
    ("message", "args", "kwargs"),
    [
        (r"input must have 4 dimensions, got shape \(6, 7, 9\)", (INPUT[0], OFFSET, WEIGHT), {}),
        ("offset must have 4 dimensions", (INPUT, OFFSET[0], WEIGHT), {}),
        ("weight must have 4 dimensions", (INPUT, OFFSET, WEIGHT[0]), {}),
        (r"weight must be \[O, 6 / groups, kh, kw\]", (INPUT, OFFSET, WEIGHT[:, :4]), {}),
        (r"weight must be .* O a multiple of groups", (INPUT, OFFSET, WEIGHT[:3, :3]), {}),
        (r"bias must be \[4\] to fit weight, got \(3,\)", (INPUT, OFFSET, WEIGHT, BIAS[:3]), {}),
        (r"offset must be \[2, 18 \* G, 7, 9\] .* got \(1, 36, 7, 9\)", (INPUT, OFFSET[:1], WEIGHT), {}),
        ("offset must be", (INPUT, OFFSET[:, :35], WEIGHT), {}),
        ("offset must be", (INPUT, OFFSET[:, :0], WEIGHT), {}),
        ("offset must be .* G a divisor of 6", (INPUT, OFFSET.repeat(1, 2, 1, 1), WEIGHT), {}),
        (r"offset must be \[2, 18 \* G, 4, 5\]", (INPUT, OFFSET, WEIGHT), {"stride": 2}),
        (r"mask must be \[2, 18, 7, 9\], got \(2, 9, 7, 9\)", (INPUT, OFFSET, WEIGHT), {"mask": MASK[:, :9]}),
        ("stride must be one or two ints of at least 1, got 0", (INPUT, OFFSET, WEIGHT), {"stride": 0}),
        ("padding must be one or two ints of at least 0", (INPUT, OFFSET, WEIGHT), {"padding": (1, -1)}),
        ("dilation must be one or two ints of at least 1", (INPUT, OFFSET, WEIGHT), {"dilation": (1, 1, 1)}),
        (r"input must be at least \(11, 11\) with its padding", (INPUT, OFFSET, WEIGHT), {"dilation": 5}),
    ],
)
def test_errors_name_the_argument(message, args, kwargs):
    with pytest.raises(ValueError, match=message):
        deform_conv2d(*args, **{"padding": 1, **kwargs})


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("in_channels must be a multiple of groups, got 5 with groups = 2", (5, 4, 3, 1, 0, 1, 2)),
        ("out_channels must be a multiple of groups, got 5 with groups = 2", (4, 5, 3, 1, 0, 1, 2)),
        ("in_channels must be a multiple of groups, got 4 with groups = 0", (4, 4, 3, 1, 0, 1, 0)),
        ("kernel_size must be one or two ints of at least 1, got 0", (4, 4, 0)),
    ],
)
def test_the_layer_names_the_argument(message, args):
    with pytest.raises(ValueError, match=message):
        DeformConv2d(*args)
