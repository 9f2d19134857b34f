"""The kernels for GPUs: interpreted on the CPU, and compiled for a GPU that need not be there."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from ops.test_neighborhood_attn import Sample, check_spread

from dat.ops import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}
# Size, kernel size, dilation, heads, channels, whether there is a bias, and dtype: the interpreter has no bfloat16.
CASES = (
    ((9, 11), 3, 1, 2, 8, True, torch.float32),
    ((10, 9), 7, 1, 1, 33, True, torch.float32),
    ((9, 11), 3, 2, 1, 8, False, torch.float32),
    ((5, 18), 5, 1, 1, 16, True, torch.float16),
)


def interpret(size, kernel_size, dilation, h, c, biased, dtype):
    """Forward and gradients beside the reference's, of strided inputs."""
    from dat.ops import neighborhood_attn_triton as kernels

    torch.manual_seed(0)
    query, key, value, grad = torch.randn(1, size[0] * size[1], 4, h, c).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.randn(h, 2 * kernel_size - 1, 2 * kernel_size - 1) if biased else None
    numbers = (*size, kernel_size, dilation, 0.4)
    ours = (
        kernels.forward(query, key, value, bias, *numbers),
        *kernels.backward(grad, query, key, value, bias, *numbers),
    )
    tensors = [None if tensor is None else tensor.double() for tensor in (query, key, value, bias)]
    options = {"size": size, "kernel_size": kernel_size, "dilation": dilation, "scale": 0.4}
    theirs = (
        reference.neighborhood_attn(*tensors, **options),
        *reference.neighborhood_attn_backward(grad.double(), *tensors, **options),
    )
    for found, exact in zip(ours, theirs, strict=True):
        if exact.numel():
            tolerance = TOLERANCE[dtype] * exact.abs().max().item()
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


# Maps wider than a tile and its windows; which of query, key, value, bias and gradient holds what, and in which pixel.
SPREAD = (
    ((3, 18), 1, 1, float("nan"), 27),
    ((3, 18), 1, 2, float("inf"), 0),
    ((3, 18), 1, 4, float("nan"), 27),
    ((6, 25), 2, 2, -float("inf"), 149),
)


def far_heads():
    """Heads so far from each other in memory that steps to them do not fit in 32 bits."""
    from dat.ops import neighborhood_attn_triton as kernels

    near = torch.randn(1, 3, 9, 16, dtype=torch.float16)
    # Nothing but the heads is ever touched of this.
    far = torch.empty((1 << 31) + 9 * 16, dtype=torch.float16).as_strided(near.shape, (0, 1 << 30, 16, 1)).copy_(near)
    for run in (kernels.forward, lambda *args: kernels.backward(args[0], *args)[0]):
        results = [run(tensor, near, tensor, None, 3, 3, 3, 1, 0.4) for tensor in (near, far)]
        assert torch.equal(*results)


def spread(size, dilation, which, bad, pixel):
    from dat.ops import neighborhood_attn_triton as kernels

    sample = Sample(1, 1, 5, size, 3, dilation)

    def attend(query, key, value, bias, grad):
        tensors = query, key, value, bias, *sample.numbers()
        return kernels.forward(*tensors), *kernels.backward(grad, *tensors)

    check_spread(attend, sample, which, bad, [pixel])


def test_interpreted_kernels_equal_the_reference_and_spread_only_what_windows_hold():
    """In a process of their own, as triton decides when it is imported whether it interprets."""
    calls = "[interpret(*case) for case in CASES]; far_heads(); [spread(*case) for case in SPREAD]"
    code = f"from ops.test_neighborhood_attn_triton import *; {calls}"
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, check=True)


def test_nothing_to_do():
    from dat.ops import neighborhood_attn_triton as kernels

    query, bias = torch.randn(0, 2, 99, 8), torch.randn(2, 5, 5)
    numbers = (9, 11, 3, 1, 0.4)
    assert kernels.forward(query, query, query, bias, *numbers).shape == query.shape
    *firsts, grad_bias = kernels.backward(query, query, query, query, bias, *numbers)
    assert all(first.shape == query.shape for first in firsts)
    assert torch.equal(grad_bias, torch.zeros(2, 5, 5))


KERNELS = ("_forward", "_backward_queries", "_backward_keys")
# DAT++'s, the most channels, and the widest windows whose bias has gradients.
COMPILED = [(name, *case) for name in KERNELS for case in ((32, 7, torch.bfloat16), (64, 9, torch.float32))]
COMPILED += [("_backward_queries", 32, 25, torch.float32)]


@pytest.mark.parametrize(("name", "channels", "kernel_size", "dtype"), COMPILED)
def test_kernels_compile_for_sm_90_into_tensor_core_code(name, channels, kernel_size, dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dat.ops import neighborhood_attn_triton as kernels

    kernel = getattr(kernels, name)
    constants = kernels.launch_options(torch.empty(1, 2, 64, channels, dtype=dtype), kernel_size, 1, True)
    options = {key: constants.pop(key) for key in ("num_stages", "num_warps")} | {"enable_fp_fusion": True}
    constants |= {"SIDE": kernels.power_of_2(2 * kernel_size - 1)} if "SIDE" in kernel.arg_names else {}
    floats = dict.fromkeys(("bias", "grad_bias", "log_sums", "means"), "*fp32") | {"scale": "fp32"}
    tensors = ("query", "key", "value", "grad", "out", "grad_query", "grad_key", "grad_value")
    types = (
        floats
        | dict.fromkeys(tensors, "*bf16" if dtype == torch.bfloat16 else "*fp32")
        | dict.fromkeys(constants, "constexpr")
    )
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    # What a block may use on GPUs with the least of it.
    assert compiled.metadata.shared <= 99 * 1024
