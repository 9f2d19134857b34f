"""The ops at sizes, and with numbers that are not finite, that hypothesis makes up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import test_deform_attn_op as tables
from ops import test_deform_sample as sampling
from ops import test_ms_deform_attn_extremes as attention
from ops import test_neighborhood_attn as windows
from ops.samples import DEVICES, Sample, close, close_where_finite

from dat.ops import deform_attn, deform_sample, neighborhood_attn, reference

not_finite = st.sampled_from([float("nan"), float("inf"), -float("inf")])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    H=st.integers(1, 4),
    D=st.integers(1, 70),
    Q=st.integers(0, 6),
    P=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weighted=st.booleans(),
    align_corners=st.booleans(),
)
def test_samples_of_any_sizes_equal_the_reference(**fields):
    sample = Sample(**{**fields, "shapes": tuple(fields["shapes"])})
    tensors = [t for t in sample.tensors() if t is not None]
    value, locations, *weights = (t.double() for t in tensors)
    exact = reference.deform_sample(value, sample.shapes, locations, *weights, align_corners=sample.align_corners)
    close(sampling.call(sample, tensors), exact, sampling.TOLERANCE[sample.dtype])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    reference_size=st.sampled_from([2, 4]),
    B=st.integers(0, 3),
    Q=st.integers(0, 6),
    H=st.integers(1, 4),
    D=st.integers(1, 70),
    P=st.integers(0, 5),
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
    dtypes=st.sampled_from(
        [*((dtype, None) for dtype in attention.DTYPES), *((dtype, torch.float32) for dtype in attention.DTYPES[2:])]
    ),
)
def test_attention_of_any_sizes_equals_the_reference_with_gradients(reference_size, shapes, dtypes, **sizes):
    dtype, narrow = dtypes
    for device in DEVICES:
        tensors = attention.inputs(reference_size, shapes=shapes, dtype=dtype, narrow=narrow, device=device, **sizes)
        ours = attention.with_gradients(tensors, shapes)
        assert [tensor.dtype for tensor in ours[1:]] == [tensor.dtype for tensor in tensors]
        attention.close(ours, attention.exact(tensors, shapes), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(which=st.integers(0, 2), bad=not_finite, place=st.integers(0, 10**6), D=st.integers(1, 20), Q=st.integers(1, 6))
def test_samples_of_numbers_that_are_not_finite(which, bad, place, D, Q):
    sample = Sample(B=1, H=2, D=D, Q=Q)
    tensors = sample.tensors()
    numbers = tensors[which].view(-1)
    numbers[place % len(numbers)] = bad
    value, locations, weights = (tensor.double() for tensor in tensors)
    exact = reference.deform_sample(value, sample.shapes, locations, weights)
    grads = reference.deform_sample_backward(torch.ones_like(exact), value, sample.shapes, locations, weights)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = sampling.call(sample, leaves)
    ours = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for one, other in zip((out.detach(), *ours), (exact, *grads), strict=True):
        close_where_finite(one, other, 1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 4), bad=not_finite, H=st.integers(5, 20), W=st.integers(5, 40), kernel=st.sampled_from([3, 5])
)
def test_windows_of_numbers_that_are_not_finite(which, bad, H, W, kernel):
    sample = windows.Sample(1, 1, 4, (H, W), kernel)

    def attend(*tensors):
        *leaves, grad = (tensor.requires_grad_() for tensor in tensors)
        out = neighborhood_attn(*leaves, **sample.options())
        return out.detach(), *torch.autograd.grad(out, leaves, grad.detach())

    if (kernel, kernel) != (H, W):
        windows.check_spread(attend, sample, which, bad)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(bad=not_finite, H=st.integers(2, 9), W=st.integers(2, 40), N=st.integers(1, 140), align_corners=st.booleans())
def test_tables_of_numbers_that_are_not_finite(bad, H, W, N, align_corners):
    sample = tables.Sample("fuzzed", 1, 2, 1, 8, (H, W), N, (6, 9), align_corners)
    tables.check_table(lambda tensors, grad: tables.differentiated(deform_attn, tensors, sample, grad), sample, bad)


def table_call(H, W, *tensors):
    return deform_attn(*tensors, size=(H, W), scale=0.5)


def window_call(H, W, *tensors):
    return neighborhood_attn(*tensors, size=(H, W), kernel_size=3, scale=0.5)


def sample_call(H, W, value, *points):
    return deform_sample(value, ((H, W),), *points)


def table_tensors(B, H, W, N):
    query, key, value = (torch.randn(B, 2, count, 8) for count in (H * W, N, N))
    return query, key, value, torch.rand(B, 1, N, 2) * 2 - 1, torch.randn(2, 5, 7)


def window_tensors(B, H, W, N):
    return *(torch.randn(B, 2, H * W, 8) for _ in range(3)), torch.randn(2, 5, 5)


def sample_tensors(B, H, W, N):
    return torch.randn(B, H * W, 2, 8), torch.rand(B, N, 2, 1, 3, 2), torch.randn(B, N, 2, 1, 3)


@pytest.mark.parametrize(
    ("call", "make"),
    [(sample_call, sample_tensors), (table_call, table_tensors), (window_call, window_tensors)],
    ids=["deform_sample", "deform_attn", "neighborhood_attn"],
)
def test_compiled_calls_of_any_sizes_equal_eager_ones(call, make):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(B=st.integers(0, 3), H=st.integers(3, 9), W=st.integers(3, 40), N=st.integers(1, 20))
    def compare(B, H, W, N):
        torch.manual_seed(0)
        results, tensors = [], make(B, H, W, N)
        for function in (compiled, call):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            out = function(H, W, *leaves)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)

    compare()
