"""The sampling ops at sizes that hypothesis makes up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import test_deform_sample as sampling
from ops import test_ms_deform_attn_extremes as attention
from ops.samples import Sample

from dat.ops import reference


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
    sampling.close(sampling.call(sample, tensors), exact, sampling.TOLERANCE[sample.dtype])


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
    for device in attention.DEVICES:
        tensors = attention.inputs(reference_size, shapes=shapes, dtype=dtype, narrow=narrow, device=device, **sizes)
        ours = attention.with_gradients(tensors, shapes)
        assert [tensor.dtype for tensor in ours[1:]] == [tensor.dtype for tensor in tensors]
        attention.close(ours, attention.exact(tensors, shapes), dtype)
