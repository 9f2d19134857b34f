"""Only a GPU can show these of the ops: streams, devices, graphs, synchronisation, errors of a launch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.calls import FUNCTIONS, assert_close, inputs, with_gradients
from gpu.device import DEVICE, DRY, needs_card

every_op = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_equal_those_of_the_cpu_in_float64(name, dtype):
    tensors = inputs(name, DEVICE, dtype)
    ours = with_gradients(FUNCTIONS[name], tensors)
    exact = with_gradients(FUNCTIONS[name], [t.cpu().double() for t in tensors])
    assert_close(ours, exact, 1e-4 if dtype == torch.float32 else 2e-2)


@every_op
def test_nothing_waits_for_the_device(name):
    tensors = inputs(name, DEVICE)
    with_gradients(FUNCTIONS[name], tensors)
    if not DRY:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(FUNCTIONS[name], tensors)
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")


@every_op
@pytest.mark.usefixtures("_deterministic")
def test_deterministic_sums_repeat_to_the_bit_and_equal_the_others(name):
    tensors = inputs(name, DEVICE)
    first, second = (with_gradients(FUNCTIONS[name], tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.use_deterministic_algorithms(False)
    assert_close(first, with_gradients(FUNCTIONS[name], tensors))


@needs_card
@every_op
@pytest.mark.parametrize("deterministic", [False, True])
def test_graphs_capture_forward_and_backward(name, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        tensors = inputs(name, DEVICE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            with_gradients(FUNCTIONS[name], tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = with_gradients(FUNCTIONS[name], tensors)
        for tensor in tensors:
            tensor.mul_(0.5)
        graph.replay()
        assert_close(captured, with_gradients(FUNCTIONS[name], tensors))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_card
@every_op
def test_work_is_queued_on_the_current_stream(name):
    tensors = inputs(name, DEVICE)
    expected = with_gradients(FUNCTIONS[name], tensors)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # The values arrive late, on the same stream: a kernel on another one would not see them.
        late = [torch.zeros_like(t) for t in tensors]
        torch.cuda._sleep(100_000_000)
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
        found = with_gradients(FUNCTIONS[name], late)
    side.synchronize()
    assert_close(found, expected)


@needs_card
@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current(name):
    tensors = inputs(name, DEVICE)
    found = with_gradients(FUNCTIONS[name], [t.to("cuda:1") for t in tensors])
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert_close(found, with_gradients(FUNCTIONS[name], tensors))


SIZES = [12, 16, 6, 8]


def wrong_arguments():
    """Calls of the ops themselves, without the functions that check, each with one argument that does not fit."""
    value, locations, weights = inputs("deform_sample", DEVICE)
    grad = torch.zeros(2, 50, 4, 32, device=DEVICE)
    yield "deform_sample", (value, locations, weights, [12, 16, 7, 8], False), "shapes"
    yield "deform_sample", (value, locations, weights, [-12, -16, 6, 8], False), "shapes"
    yield "deform_sample", (value, locations[:1], weights, SIZES, False), "locations"
    yield "deform_sample", (value, locations.cpu(), weights, SIZES, False), "locations"
    yield "deform_sample", (value, locations.double(), weights, SIZES, False), "locations"
    yield "deform_sample", (value, locations, weights[:, 1:], SIZES, False), "weights"
    yield "deform_sample", (value[0], locations, weights, SIZES, False), "value"
    yield "deform_sample_backward", (grad[:, 1:], value, locations, weights, SIZES, False, False), "grad"
    value, reference, offsets, logits = inputs("ms_deform_attn", DEVICE)
    yield "ms_deform_attn", (value, reference[:, 1:], offsets, logits, SIZES), "reference"
    yield "ms_deform_attn", (value, reference[..., :1], offsets, logits, SIZES), "reference"
    yield "ms_deform_attn", (value, reference, offsets[..., :1], logits, SIZES), "offsets"
    yield "ms_deform_attn", (value, reference, offsets, logits[:, :, 1:], SIZES), "logits"
    yield "ms_deform_attn", (value, reference, offsets, logits.half(), SIZES), "logits"
    yield "ms_deform_attn_backward", (grad.half(), value, reference, offsets, logits, SIZES, True, False), "grad"


@needs_card
def test_ops_refuse_arguments_that_do_not_fit():
    for name, args, message in wrong_arguments():
        with pytest.raises(RuntimeError, match=f"{name.removesuffix('_backward')}: .*{message}"):
            getattr(torch.ops.dat, name)(*args)


# Every kernel of the CUDA library; the self-test has calls of those that sample.
KERNELS = """
import torch
from dat.layers.mlp import residual_depthwise
from dat.ops.__main__ import LIMITS, check_op

for shape in ((3, 9, 13, 260), (2, 7, 7, 8)):
    conv = torch.nn.Conv2d(shape[-1], shape[-1], 3, padding=1, groups=shape[-1], device=DEVICE)
    for half in (False, True):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            residual_depthwise(conv, x).sum().backward()
for op in ("deform_sample", "ms_deform_attn"):
    for dtype in LIMITS:
        result = check_op(DEVICE, op, dtype)
        assert result.passed, result
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None and not DRY, reason="needs compute-sanitizer")
def test_kernels_touch_no_memory_of_others():
    sanitizer = () if DRY else ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    command = *sanitizer, sys.executable, "-c", KERNELS.replace("DEVICE", repr(DEVICE.type))
    # Blocks that torch keeps for itself would hide an access beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=170
    )
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-2000:]
