from dataclasses import replace

import pytest
import torch
from ops.samples import SAMPLES, Sample, close, every_device, opcheck

from dat.ops import deform_sample, ms_deform_attn, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# The sampling op's list, of which every sample is attended to from points and from boxes.
WEIGHTED = [sample for sample in SAMPLES if sample.weighted]
every_sample = pytest.mark.parametrize("sample", WEIGHTED, ids=lambda sample: sample.name)
# Of these the dispatch of the compiler is checked, which takes seconds.
DISPATCHED = ("torch.float64", "torch.float32", "torch.bfloat16", "strided", "batch-0")
points_and_boxes = pytest.mark.parametrize("reference_size", [2, 4])


def inputs(sample, reference_size, narrow=False):
    """Value, reference, offsets and logits; `narrow`: offsets and logits in the dtype of the values."""
    value, locations, _ = sample.tensors()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, scale, dtype):
        normal = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        drawn = normal.to(sample.device, dtype)
        return drawn if sample.contiguous else drawn.transpose(0, -1).contiguous().transpose(0, -1)

    points = sample.dtype if narrow else locations.dtype
    layout = locations.shape[:-1]
    anchors = draw(layout[0], layout[1], layout[3], reference_size, scale=0.3, dtype=locations.dtype) + 0.5
    return value, anchors, draw(*layout, 2, scale=2, dtype=points), draw(*layout, scale=2, dtype=points)


@every_device
@points_and_boxes
@pytest.mark.parametrize(
    ("sample", "narrow"),
    [(s, narrow) for s in WEIGHTED for narrow in (False, True) if not narrow or s.dtype.itemsize == 2],
    ids=lambda x: x.name if isinstance(x, Sample) else "narrow" if x else "wide",
)
def test_forward_and_gradients_equal_the_reference_in_float64(sample, narrow, reference_size, device):
    leaves = [t.requires_grad_() for t in inputs(replace(sample, device=device), reference_size, narrow)]
    out = ms_deform_attn(leaves[0], sample.shapes, *leaves[1:])
    assert out.dtype == sample.dtype
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    ours = torch.autograd.grad(out, leaves, grad)

    value, *points = (t.detach().double() for t in leaves)
    close(out, reference.ms_deform_attn(value, sample.shapes, *points), TOLERANCE[sample.dtype])
    theirs = reference.ms_deform_attn_backward(grad.double(), value, sample.shapes, *points)
    for by_ours, by_reference, leaf in zip(ours, theirs, leaves, strict=True):
        assert by_ours.dtype == leaf.dtype
        close(by_ours, by_reference, TOLERANCE[sample.dtype])


def test_offsets_are_pixels_of_their_level_around_points():
    sample = Sample(P=3, shapes=((4, 6), (2, 3)), dtype=torch.float64)
    value, anchors, offsets, logits = inputs(sample, 2)
    locations = torch.empty_like(offsets)
    for level, (h, w) in enumerate(sample.shapes):
        locations[:, :, :, level, :, 0] = anchors[:, :, None, level, None, 0] + offsets[:, :, :, level, :, 0] / w
        locations[:, :, :, level, :, 1] = anchors[:, :, None, level, None, 1] + offsets[:, :, :, level, :, 1] / h
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    out = ms_deform_attn(value, sample.shapes, anchors, offsets, logits)
    torch.testing.assert_close(out, deform_sample(value, sample.shapes, locations, weights))


def test_offsets_are_half_boxes_over_points_around_boxes():
    sample = Sample(P=3, shapes=((4, 6), (2, 3)), dtype=torch.float64)
    value, anchors, offsets, logits = inputs(sample, 4)
    center, size = anchors[..., :2], anchors[..., 2:]
    locations = center[:, :, None, :, None] + offsets / 3 * size[:, :, None, :, None] * 0.5
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    out = ms_deform_attn(value, sample.shapes, anchors, offsets, logits)
    torch.testing.assert_close(out, deform_sample(value, sample.shapes, locations, weights))


@every_device
@points_and_boxes
def test_gradcheck_once_and_twice(reference_size, device):
    sample = Sample(B=1, H=2, D=3, Q=2, P=2, shapes=((3, 4), (2, 2)), dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in inputs(sample, reference_size)]

    def attend(value, *points):
        return ms_deform_attn(value, sample.shapes, *points)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_the_reference_needs_no_gradient():
    """As in an encoder: the others' gradients stay, and none is worked out for it."""
    sample = Sample()
    leaves = [t.requires_grad_() for t in inputs(sample, 2)]
    expected = torch.autograd.grad(ms_deform_attn(leaves[0], sample.shapes, *leaves[1:]).sum(), leaves)
    leaves[1] = leaves[1].detach()
    present = [leaves[0], *leaves[2:]]
    found = torch.autograd.grad(ms_deform_attn(leaves[0], sample.shapes, *leaves[1:]).sum(), present)
    for ours, theirs in zip(found, (expected[0], *expected[2:]), strict=True):
        assert torch.equal(ours, theirs)


@every_device
@points_and_boxes
@every_sample
def test_opcheck_of_forward_and_backward(sample, reference_size, device):
    tensors = [t.requires_grad_() for t in inputs(replace(sample, device=device), reference_size)]
    shapes = sample.flat_shapes()
    opcheck(
        torch.ops.dat.ms_deform_attn,
        (*tensors, shapes),
        dispatch=sample.name in DISPATCHED,
        atol=TOLERANCE[sample.dtype],
    )
    if sample.dtype == torch.float64:
        grad = torch.randn(sample.B, sample.Q, sample.H, sample.D, dtype=torch.float64, device=device)
        torch.library.opcheck(torch.ops.dat.ms_deform_attn_backward, (grad, *tensors, shapes, True, False))


@pytest.mark.parametrize("threads", [1, 2, 5, 13])
def test_gradients_with_any_number_of_threads(threads):
    sample = Sample(B=1, Q=61, P=4, D=24)
    leaves = [t.requires_grad_() for t in inputs(sample, 4)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = ms_deform_attn(leaves[0], sample.shapes, *leaves[1:])
        ours = torch.autograd.grad(out, leaves, torch.ones_like(out))
    finally:
        torch.set_num_threads(before)
    value, *points = (t.detach().double() for t in leaves)
    theirs = reference.ms_deform_attn_backward(torch.ones_like(out).double(), value, sample.shapes, *points)
    for by_ours, by_reference in zip(ours, theirs, strict=True):
        close(by_ours, by_reference, TOLERANCE[torch.float32])


def test_queries_as_many_as_cells_equal_fewer():
    """Self-attention is walked in tiles of the map."""
    sample = Sample(shapes=((19, 37), (5, 3)), Q=19 * 37 + 15)
    value, *points = inputs(sample, 2)
    whole = ms_deform_attn(value, sample.shapes, *points)
    halves = [
        ms_deform_attn(value, sample.shapes, *(p[:, part] for p in points)) for part in (slice(350), slice(350, None))
    ]
    assert torch.equal(whole, torch.cat(halves, 1))


@every_device
def test_autocast_takes_half_precision_values_and_offsets(device):
    sample = Sample(device=device)
    value, anchors, offsets, logits = inputs(sample, 2)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ms_deform_attn(value, sample.shapes, anchors, offsets.bfloat16(), logits.bfloat16())
    expected = ms_deform_attn(value.bfloat16(), sample.shapes, anchors, offsets.bfloat16(), logits.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_forward_mode_is_refused():
    sample = Sample()
    value, *points = inputs(sample, 2)
    with pytest.raises(NotImplementedError, match="ms_deform_attn has no forward-mode derivatives"):
        torch.func.jvp(lambda v: ms_deform_attn(v, sample.shapes, *points), (value,), (value,))


def test_vmap_and_batched_gradients_equal_a_loop():
    sample = Sample(dtype=torch.float64)
    value, *points = (t.requires_grad_() for t in inputs(sample, 2))
    values = torch.stack((value, value * 2, -value))
    mapped = torch.vmap(lambda v: ms_deform_attn(v, sample.shapes, *points))(values)
    torch.testing.assert_close(mapped, torch.stack([ms_deform_attn(v, sample.shapes, *points) for v in values]))
    out = ms_deform_attn(value, sample.shapes, *points)
    grads = torch.stack((torch.ones_like(out), torch.full_like(out, -2)))
    batched = torch.autograd.grad(out, (value, *points), grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        alone = torch.autograd.grad(out, (value, *points), grad, retain_graph=True)
        for ours, theirs in zip(batched, alone, strict=True):
            torch.testing.assert_close(ours[k], theirs)


VALUE, ANCHORS, OFFSETS, LOGITS = inputs(Sample(), 2)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (ValueError, r"value must be \[B, S, H, D\]", (VALUE[0], Sample.shapes, ANCHORS, OFFSETS, LOGITS)),
        (ValueError, "shapes .* S = 39", (VALUE, ((5, 7),), ANCHORS, OFFSETS, LOGITS)),
        (ValueError, "shapes must be", (VALUE, (5, 7), ANCHORS, OFFSETS, LOGITS)),
        (ValueError, "shapes must be", (VALUE, ((5, 7, 1),), ANCHORS, OFFSETS, LOGITS)),
        (ValueError, "shapes must be", (VALUE, ((5.0, 7.0),), ANCHORS, OFFSETS, LOGITS)),
        (ValueError, "shapes must be", (VALUE, ((-39, -1), *Sample.shapes[1:]), ANCHORS, OFFSETS, LOGITS)),
        (
            ValueError,
            r"reference must be \[2, Q, 3, 2 or 4\]",
            (VALUE, Sample.shapes, ANCHORS[..., :1], OFFSETS, LOGITS),
        ),
        (ValueError, r"reference must be \[2, Q, 3, 2 or 4\]", (VALUE, Sample.shapes, ANCHORS[:1], OFFSETS, LOGITS)),
        (TypeError, "reference must be float32 or", (VALUE, Sample.shapes, ANCHORS.half(), OFFSETS, LOGITS)),
        (ValueError, r"offsets must be \[2, 5, 3, 3, P, 2\]", (VALUE, Sample.shapes, ANCHORS, OFFSETS[:, :2], LOGITS)),
        (TypeError, "offsets must be floating point", (VALUE, Sample.shapes, ANCHORS, OFFSETS.long(), LOGITS)),
        (ValueError, r"logits must be \(2, 5, 3, 3, 2\)", (VALUE, Sample.shapes, ANCHORS, OFFSETS, LOGITS[:, 1:])),
        (ValueError, "logits must be on the device", (VALUE, Sample.shapes, ANCHORS, OFFSETS, LOGITS.to("meta"))),
    ],
)
def test_errors_name_the_argument(error, message, args):
    with pytest.raises(error, match=message):
        ms_deform_attn(*args)
