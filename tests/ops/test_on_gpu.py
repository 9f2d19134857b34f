"""What only a GPU can show of the sampling ops: streams, devices, graphs, the two ways to take the backward's sums."""

import pytest
import torch
from ops.samples import Sample

from dat.ops import MISSING, deform_sample, ms_deform_attn

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or MISSING["_C_cuda"] is not None, reason="needs a GPU and the CUDA library"
)
SAMPLE = Sample(Q=50, D=32, P=4, device="cuda")


def sampling(value, locations, weights):
    return deform_sample(value, SAMPLE.shapes, locations, weights)


def attention(value, locations, weights):
    return ms_deform_attn(value, SAMPLE.shapes, locations.mean((2, 4)), locations, weights)


def with_gradients(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.device), rtol=1e-4, atol=1e-4)


both = pytest.mark.parametrize("function", [sampling, attention])


@both
@pytest.mark.parametrize("deterministic", [False, True])
def test_graphs_capture_forward_and_backward(function, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        inputs = [t.clone() for t in SAMPLE.tensors()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            with_gradients(function, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = with_gradients(function, inputs)
        for tensor in inputs:
            tensor.mul_(0.5)
        graph.replay()
        assert_close(captured, with_gradients(function, inputs))
    finally:
        torch.use_deterministic_algorithms(False)


@both
def test_work_is_queued_on_the_current_stream(function):
    tensors = SAMPLE.tensors()
    expected = with_gradients(function, tensors)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # The values arrive late, on the same stream: a kernel on another one would not see them.
        late = [torch.zeros_like(t) for t in tensors]
        torch.cuda._sleep(100_000_000)
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
        found = with_gradients(function, late)
    side.synchronize()
    assert_close(found, expected)


@both
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current(function):
    tensors = SAMPLE.tensors()
    found = with_gradients(function, [t.to("cuda:1") for t in tensors])
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert_close(found, with_gradients(function, tensors))


@both
def test_sorted_sums_equal_atomic_sums_and_repeat_to_the_bit(function):
    tensors = SAMPLE.tensors()
    atomic = with_gradients(function, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(function, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(first, atomic)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
