import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from ops.samples import SAMPLES, Sample, close, every_device
from torch.nn import functional as F

from dat.ops import MISSING, deform_sample, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def call(sample, tensors):
    value, locations, *weights = (t for t in tensors if t is not None)
    return deform_sample(value, sample.shapes, locations, *weights, align_corners=sample.align_corners)


def grid_sample(sample, value, locations, weights):
    """The oracle: torch's own grid_sample, level by level."""
    B, Q, H, L, P, _ = locations.shape
    starts = [sum(h * w for h, w in sample.shapes[:level]) for level in range(L)]
    levels = []
    for level, (h, w) in enumerate(sample.shapes):
        image = value[:, starts[level] : starts[level] + h * w].permute(0, 2, 3, 1).reshape(B * H, -1, h, w)
        grid = locations[:, :, :, level].transpose(1, 2).reshape(B * H, Q, P, 2) * 2 - 1
        out = F.grid_sample(image, grid, padding_mode="zeros", align_corners=sample.align_corners)
        levels.append(out.view(B, H, -1, Q, P).permute(0, 3, 1, 4, 2))
    out = torch.stack(levels, 3)
    return out if weights is None else (out * weights.unsqueeze(-1)).sum((3, 4))


needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@needs_compiler
def test_the_cpu_library_is_in_use():
    assert MISSING["_C_cpu"] is None


@every_device
@every_sample
def test_forward_and_gradients_equal_the_reference_in_float64(sample, device):
    tensors = [t for t in replace(sample, device=device).tensors() if t is not None]
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(sample, leaves)
    assert out.dtype == sample.dtype
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    ours = torch.autograd.grad(out, leaves, grad)

    exact = [t.detach().double() for t in tensors]
    value, locations, *weights = exact
    kwargs = {"align_corners": sample.align_corners}
    close(out, reference.deform_sample(value, sample.shapes, locations, *weights, **kwargs), TOLERANCE[sample.dtype])
    theirs = reference.deform_sample_backward(grad.double(), value, sample.shapes, locations, *weights, **kwargs)
    for by_ours, by_reference, leaf in zip(ours, theirs, leaves, strict=False):
        assert by_ours.dtype == leaf.dtype
        close(by_ours, by_reference, TOLERANCE[sample.dtype])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_reference_equals_grid_sample_with_gradients(weighted, align_corners):
    sample = Sample(dtype=torch.float64, weighted=weighted, align_corners=align_corners)
    leaves = [t.requires_grad_() for t in sample.tensors() if t is not None]
    value, locations, *weights = leaves
    ours = reference.deform_sample(value, sample.shapes, locations, *weights, align_corners=align_corners)
    theirs = grid_sample(sample, value, locations, weights[0] if weights else None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    grad = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@every_device
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_once_and_twice(weighted, align_corners, device):
    sample = Sample(B=1, H=2, D=3, Q=2, P=2, shapes=((3, 4), (2, 2)), dtype=torch.float64, weighted=weighted)
    sample = replace(sample, align_corners=align_corners, device=device)
    leaves = [t.requires_grad_() for t in sample.tensors() if t is not None]
    # The backward on a GPU adds by atomics, in any order.
    tolerance = 1e-10 if device == "cuda" else 0.0
    assert torch.autograd.gradcheck(lambda *t: call(sample, t), leaves, nondet_tol=tolerance)
    assert torch.autograd.gradgradcheck(lambda *t: call(sample, t), leaves, nondet_tol=tolerance)


@every_device
@every_sample
def test_opcheck(sample, device):
    value, locations, weights = replace(sample, device=device).tensors()
    value, locations = value.requires_grad_(), locations.requires_grad_()
    args = (value, locations, weights, sample.flat_shapes(), sample.align_corners)
    torch.library.opcheck(torch.ops.dat.deform_sample, args, atol=TOLERANCE[sample.dtype], rtol=0)


def test_opcheck_of_the_backward():
    sample = Sample(dtype=torch.float64)
    value, locations, weights = sample.tensors()
    grad = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    args = (grad, value, locations, weights, sample.flat_shapes(), False, False)
    torch.library.opcheck(torch.ops.dat.deform_sample_backward, args)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.B and s.Q and s.P and s.D], ids=lambda sample: sample.name)
def test_compiles_whole_forward_and_backward(sample):
    def loss(*tensors):
        return call(sample, tensors).float().square().sum()

    tensors = [t for t in sample.tensors() if t is not None]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_locations_that_are_not_numbers_or_far_away_sample_zero(dtype, device):
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, -3e9, 1.5, -0.5], device=device)
    for axis in range(2):
        locations = torch.full((1, len(wild), 1, 1, 1, 2), 0.5, device=device)
        locations[0, :, 0, 0, 0, axis] = wild
        locations.requires_grad_()
        value = torch.ones(1, 12, 1, 8, device=device, dtype=dtype, requires_grad=True)
        out = deform_sample(value, ((3, 4),), locations)
        assert out.count_nonzero() == 0
        by_value, by_locations = torch.autograd.grad(out, (value, locations), torch.ones_like(out))
        assert by_value.count_nonzero() == 0
        assert by_locations.count_nonzero() == 0


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_samples_outside_count_for_nothing_whatever_their_weight(weight, dtype, device):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    outside = torch.tensor([[1.5, 0.5], [0.5, -3.0], [float("nan"), 0.5], [0.5, 1e30]], dtype=real, device=device)
    inside = torch.tensor([[0.3, 0.6]], dtype=real, device=device)
    locations = torch.cat((inside, outside)).view(1, 1, 1, 1, 5, 2).requires_grad_()
    weights = torch.tensor([2.0, *[weight] * 4], dtype=real, device=device).view(1, 1, 1, 1, 5).requires_grad_()
    value = Sample(B=1, H=1, shapes=((3, 4),), dtype=dtype, device=device).tensors()[0].requires_grad_()
    alone = deform_sample(value, ((3, 4),), locations[:, :, :, :, :1], weights[..., :1])
    for function in (deform_sample, reference.deform_sample):
        out = function(value, ((3, 4),), locations, weights)
        close(out, alone.double(), TOLERANCE[dtype])
        by_value, by_locations, by_weights = torch.autograd.grad(out.sum(), (value, locations, weights))
        assert by_value.isfinite().all()
        assert by_locations[..., 0, :].isfinite().all()
        assert by_locations[..., 1:, :].count_nonzero() == by_weights[..., 1:].count_nonzero() == 0
    args = torch.ones_like(out), value, ((3, 4),), locations, weights
    assert all(grad.isfinite().all() for grad in reference.deform_sample_backward(*args))


@every_device
def test_rows_that_no_sample_touches_may_hold_anything(device):
    value = torch.full((1, 12, 1, 8), float("nan"), device=device)
    value[0, 5] = 1.0
    inside = torch.tensor([(1 + 0.5) / 4, (1 + 0.5) / 3], device=device).view(1, 1, 1, 1, 1, 2)
    outside = inside.new_full((1, 1, 1, 1, 1, 2), 2.0)
    locations = torch.cat((outside, outside), 1)
    assert deform_sample(value, ((3, 4),), locations).count_nonzero() == 0


@every_device
def test_backward_is_deterministic_when_asked_to_be(device):
    sample = Sample(B=2, Q=500, P=4, D=16, device=device)
    leaves = [t.requires_grad_() for t in sample.tensors()]
    torch.use_deterministic_algorithms(True)
    first, second = (torch.autograd.grad(call(sample, leaves).square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def with_threads(count, sample):
    leaves = [t.detach().requires_grad_() for t in sample.tensors()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        out = call(sample, leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_up_to_the_heads_gives_the_same_bits(threads):
    sample = Sample(B=2, Q=400, P=4, D=16)
    for one, several in zip(with_threads(1, sample), with_threads(threads, sample), strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [5, 13])
def test_more_threads_than_heads_share_them(threads, dtype):
    """Each thread's sums are its own, and are added in one order: the same bits at every call."""
    sample = Sample(B=1, Q=41, P=4, D=24, dtype=dtype)
    first, again = (with_threads(threads, sample) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ours, exact in zip(first, with_threads(1, sample), strict=True):
        close(ours, exact.double(), TOLERANCE[dtype])


@every_device
def test_autocast_keeps_locations_in_float32(device):
    sample = Sample(device=device)
    value, locations, weights = sample.tensors()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = deform_sample(value, sample.shapes, locations, weights)
    assert out.dtype == torch.bfloat16
    expected = deform_sample(value.bfloat16(), sample.shapes, locations, weights)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_batched_gradients_equal_a_loop():
    sample = Sample(dtype=torch.float64)
    leaves = [t.requires_grad_() for t in sample.tensors()]
    out = call(sample, leaves)
    grads = torch.stack([torch.full_like(out, k) for k in (1.0, 2.0, -3.0)])
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        for ours, alone in zip(batched, torch.autograd.grad(out, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[k], alone)


def test_forward_mode_is_refused():
    sample = Sample()
    value, locations, weights = sample.tensors()
    with pytest.raises(NotImplementedError, match="deform_sample has no forward-mode derivatives"):
        torch.func.jvp(lambda v: deform_sample(v, sample.shapes, locations, weights), (value,), (value,))


def test_vmap_over_nothing_is_empty():
    sample = Sample()
    value, locations, weights = sample.tensors()
    mapped = torch.vmap(lambda v: deform_sample(v, sample.shapes, locations, weights))(value.new_empty(0, *value.shape))
    assert mapped.shape == (0, 2, 5, 3, 8)


def test_vmap_equals_a_loop():
    sample = Sample()
    value, locations, weights = sample.tensors()
    values = torch.stack((value, value * 2, -value))
    mapped = torch.vmap(lambda v: deform_sample(v, sample.shapes, locations, weights))(values)
    looped = torch.stack([deform_sample(v, sample.shapes, locations, weights) for v in values])
    torch.testing.assert_close(mapped, looped)


VALUE, LOCATIONS, WEIGHTS = Sample().tensors()


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (ValueError, r"value must be \[B, S, H, D\]", (VALUE[0], Sample.shapes, LOCATIONS, WEIGHTS)),
        (TypeError, "value must be float32.*got torch.int64", (VALUE.long(), Sample.shapes, LOCATIONS, WEIGHTS)),
        (TypeError, "shapes must be .* got a tensor", (VALUE, torch.tensor(Sample.shapes), LOCATIONS, WEIGHTS)),
        (ValueError, "shapes .* S = 39", (VALUE, ((5, 7), (3, 1), (2, 1)), LOCATIONS, WEIGHTS)),
        (ValueError, "shapes must be", (VALUE, (5, 7), LOCATIONS, WEIGHTS)),
        (ValueError, "shapes must be", (VALUE, np.array(Sample.shapes), LOCATIONS, WEIGHTS)),
        (ValueError, "shapes must be", (VALUE, ((39.0, 1.0),), LOCATIONS, WEIGHTS)),
        (ValueError, r"locations must be \[B, Q, H, L, P, 2\]", (VALUE, Sample.shapes, LOCATIONS[..., 0], WEIGHTS)),
        (ValueError, r"locations must be \[2, Q, 3, 3, P, 2\]", (VALUE, Sample.shapes, LOCATIONS[:1], WEIGHTS[:1])),
        (TypeError, "locations must be float32 or float64", (VALUE, Sample.shapes, LOCATIONS.half(), WEIGHTS)),
        (ValueError, "weights must be .* to fit locations", (VALUE, Sample.shapes, LOCATIONS, WEIGHTS[:, 1:])),
        (TypeError, "weights must be floating point", (VALUE, Sample.shapes, LOCATIONS, WEIGHTS.long())),
        (ValueError, "locations must be on the device", (VALUE, Sample.shapes, LOCATIONS.to("meta"), WEIGHTS)),
    ],
)
def test_errors_name_the_argument(error, message, args):
    with pytest.raises(error, match=message):
        deform_sample(*args)


def test_third_derivatives_equal_those_of_the_reference():
    sample = Sample(B=1, H=1, D=2, Q=2, P=1, shapes=((3, 4),), dtype=torch.float64)
    value, locations, weights = sample.tensors()

    def third(function):
        w, x = weights.clone().requires_grad_(), locations.clone().requires_grad_()
        # The locations depend on the weights, so that a derivative that takes the wrong path shows.
        out = function(value, sample.shapes, x + 0.01 * w.unsqueeze(-1), w).pow(2).sum()
        for leaf in (x, w):
            out = torch.autograd.grad(out, leaf, create_graph=True)[0].pow(2).sum()
        return torch.autograd.grad(out, (x, w))

    for ours, exact in zip(third(deform_sample), third(reference.deform_sample), strict=True):
        torch.testing.assert_close(ours, exact)
