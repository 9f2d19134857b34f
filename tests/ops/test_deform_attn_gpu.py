"""The Triton kernels without a GPU: under Triton's interpreter, and compiled for one.

Triton decides when it is imported whether it interprets, so that each takes a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INTERPRET = """
import torch
from ops.test_deform_attn_op import SAMPLES, Sample, close, output_gradient, reference
from dat.ops import deform_attn_gpu

# The interpreter has no products of bfloat16.
tolerance = {torch.float32: 2e-5, torch.float16: 5e-3}
names = {"own-table", "own-table-2022", "far-positions", "one-cell-table", "one-row", "no-table", "one-channel"}
SAMPLES = [s for s in SAMPLES if s.name.rsplit("-torch", 1)[0] in names and s.dtype in tolerance]
SAMPLES.append(Sample("blocks", B=1, h=2, g=1, size=(9, 11), table=(7, 5), N=70, c=17))
for sample in SAMPLES:
    *tensors, table = sample.tensors() if sample.table else (*sample.tensors(), None)
    options = list(sample.size), 0.4, sample.align_corners
    grad = output_gradient(sample)
    out, lse = deform_attn_gpu.forward(*tensors, table, *options)
    wide = [t.double() for t in tensors]
    wide.append(None if table is None else table.double())
    close(out, reference.deform_attn(*wide, **sample.kwargs), tolerance[sample.dtype])
    exact = reference.deform_attn_backward(grad.double(), *wide, **sample.kwargs)
    for deterministic in (False, True):
        ours = deform_attn_gpu.backward(grad, *tensors, table, out, lse, *options, deterministic)
        for by_ours, by_reference in zip(ours, exact, strict=True):
            close(by_ours, by_reference, tolerance[sample.dtype])
    print("equal", sample.name)
"""

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dat.ops import deform_attn_gpu as gpu

POINTERS = "query key value positions table grid_x grid_y out lse grad dots by_query by_key by_value".split()
POINTERS += ["by_positions", "by_table"]
for kernel in (gpu._forward_kernel, gpu._query_kernel, gpu._key_kernel):
    for dtype, biased, fixed in (("fp32", True, False), ("bf16", True, True)):
        constants = {"BIASED": biased, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32", "M": 64, "K": 64, "D": 32}
        constants |= {"FIXED": fixed} if "FIXED" in kernel.arg_names else {}
        signature = {}
        for name in kernel.arg_names:
            half = name in ("query", "key", "value", "out", "grad", "by_query")
            pointer = "*" + (dtype if half else "i64" if name == "by_table" and fixed else "fp32")
            kind = pointer if name in POINTERS else "*fp64" if name == "unit" else "i32"
            signature[name] = "constexpr" if name in constants else "fp32" if name == "scale" else kind
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print("compiled", kernel.__name__, dtype, biased, fixed, len(compiled.asm["cubin"]))
"""


def run(script, **env):
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_equal_the_reference():
    pytest.importorskip("triton")
    assert run(INTERPRET, TRITON_INTERPRET="1").count("equal") == 9


def test_kernels_compile_for_sm_90(tmp_path):
    pytest.importorskip("triton")
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).count("compiled") == 6
