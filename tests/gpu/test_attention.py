"""Attention at the size of detectors, whose backward pass takes several chunks of keys."""

from functools import partial

import pytest
import torch
from gpu.calls import FUNCTIONS, assert_close, inputs, with_gradients
from gpu.device import DEVICE, DRY, needs_card

from benchmarks import deform_attn as benchmark
from benchmarks.timing import peak_bytes
from dat.ops import deform_attn

WORK = benchmark.Work(1, 2, 1, (5, 7), (3, 4), 3) if DRY else benchmark.Work(1, 2, 1, (50, 68), (25, 34), 14)
every_attention = pytest.mark.parametrize("name", ["deform_attn", "neighborhood_attn"])
ATTEND = partial(deform_attn, size=WORK.size, scale=WORK.channels**-0.5)


def tensors(dtype):
    drawn = benchmark.inputs(WORK, torch.device(DEVICE))
    return [t.to(dtype) for t in drawn[:3]] + drawn[3:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_keys_equal_the_cpu_in_float64_and_repeat_to_the_bit(dtype):
    ours, again = (with_gradients(ATTEND, tensors(dtype)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert_close(
        ours,
        with_gradients(ATTEND, [t.cpu().double() for t in tensors(dtype)]),
        1e-4 if dtype == torch.float32 else 2e-2,
    )


@every_attention
def test_products_in_tf32_where_torch_allows_it(name):
    drawn = inputs(name, DEVICE)
    exact = with_gradients(FUNCTIONS[name], drawn)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = with_gradients(FUNCTIONS[name], drawn)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert DRY or not torch.equal(rounded[0], exact[0])
    assert_close(rounded, exact, 1e-2)


@needs_card
def test_memory_is_a_fraction_of_the_scores():
    drawn = tensors(torch.bfloat16)
    with_gradients(ATTEND, drawn)
    # Displacements, bias and scores of the official formulation take 23 bytes a pair, forward and backward.
    official = 23 * WORK.heads * 3400 * 850
    assert peak_bytes(lambda: with_gradients(ATTEND, drawn), torch.device(DEVICE)) < official / 4
