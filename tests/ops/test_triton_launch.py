"""Launches: the second of a kind goes past Triton, and must come to the same kernel with the same arguments."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from dat.ops import _common

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")


def record_launches():
    """Compiles for sm_90 on a driver that notes what is launched in the place of launching it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from dat.ops import deform_attn_triton, triton_launch

    # Every launch with the launcher of its kernel.
    launches = []

    class Launcher:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *args):
            launches.append((self, args))

    class Driver:
        launcher_cls = Launcher

        class utils:
            get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
            load_binary = staticmethod(lambda *args: (1, 1, 32, 0, 1024))
            unload_module = staticmethod(lambda module: None)

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)

    driver.set_active(Driver())
    constants = {"BLOCK": 64}

    def run(tensors, numbers):
        triton_launch.launch(deform_attn_triton.prepare_kernel, 3, tensors, numbers, constants)
        return launches[-1]

    def tensors(offset=0, dtype=torch.float32):
        return tuple(torch.zeros(65, dtype=dtype)[offset:] for _ in range(4))

    aligned = tensors()
    (first, args), (again, again_args) = run(aligned, (5, 6, 7, 8)), run(aligned, (5, 6, 7, 8))
    assert first is again
    # Tensors are compared by identity; what hooks are told is made anew for every launch.
    kernel_args, same_args = ([id(a) if isinstance(a, torch.Tensor) else a for a in x[9:]] for x in (args, again_args))
    assert kernel_args == same_args
    assert kernel_args == [*map(id, aligned), 5, 6, 7, 8, 64]
    assert args[:6] == again_args[:6]
    assert args[:4] == (3, 1, 1, 7)
    # Other numbers come to the kernel that Triton finds for them; other alignment and dtypes need other kernels.
    same, other_args = run(tensors(), (5, 6, 7, 9))
    assert same is first
    assert other_args[-2] == 9
    assert run(tensors(1), (5, 6, 7, 8))[0] is not first
    assert run(tensors(dtype=torch.bfloat16), (5, 6, 7, 8))[0] is not first
    assert run(aligned, (5, 6, 7, 8))[0] is first
    triton_launch.MOST_KEYS = 2
    for number in range(5):
        assert run(aligned, (5, 6, 7, 100 + number))[0] is first
    assert len(triton_launch._compiled) <= 2
    print("as Triton launches them")


def test_launches_after_the_first_equal_those_of_triton(tmp_path):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join((str(tests), str(tests.parent)))
    done = subprocess.run(
        [sys.executable, "-c", "from ops.test_triton_launch import *; record_launches()"],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "as Triton launches them" in done.stdout, done.stderr


class Broken:
    @property
    def active(self):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


@pytest.mark.parametrize(
    ("driver", "reason"), [(Broken(), "Failed to find C compiler."), (SimpleNamespace(active=Mock()), "")]
)
def test_triton_that_does_not_work_is_not_used(driver, reason, monkeypatch, recwarn):
    monkeypatch.setattr("triton.runtime.driver", driver)
    monkeypatch.setattr(_common, "why_no_triton", _common.why_no_triton.__wrapped__)
    assert _common.has_triton.__wrapped__() == (not reason)
    assert [str(warning.message) for warning in recwarn] == (
        [f"Triton does not work, so DAT's attentions are slow on this GPU: {reason}"] if reason else []
    )


def test_tiles_that_a_gpu_has_no_memory_for_run_on_the_reference():
    from triton.runtime.errors import OutOfResources

    def run(error):
        return _common.run_triton(Mock(side_effect=error), lambda x: x + 1, torch.zeros(1), 2)

    assert run(OutOfResources(73728, 65536, "shared memory")) == 3
    with pytest.raises(ValueError, match="another"):
        run(ValueError("another"))


@pytest.mark.parametrize(("allowed", "precision"), [("ieee", "tf32x3"), ("tf32", "tf32")])
def test_products_of_float32_are_exact_unless_torch_allows_tf32(allowed, precision):
    from dat.ops.triton_launch import product_precision

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = allowed
    try:
        assert product_precision(torch.float32) == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
