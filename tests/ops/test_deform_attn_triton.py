"""The Triton kernels without a GPU: under Triton's interpreter, and compiled for one.

Triton decides when it is imported whether it interprets, which takes a process of its own.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ops.test_deform_attn_op import SHAPES, TABLES, Sample, check_table, close, output_gradient

from dat.ops import reference

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# The interpreter has no products of bfloat16.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}

RESOURCES = [
    (torch.bfloat16, "bf16", 32, 0),
    (torch.float32, "fp32", 32, 192),
    (torch.float32, "fp32", 128, 272),
]

SMALL = Sample("small", B=1, h=2, g=1)
NAMES = {"far-positions", "one-cell-table", "one-row", "one-column-other-table", "one-query", "one-key", "no-table"}
SAMPLES = [replace(sample, B=1, h=2, g=1) for sample in SHAPES if sample.name in NAMES]
SAMPLES += [
    Sample("groups", size=(3, 4), c=4),
    replace(SMALL, name="chunks", h=1, size=(9, 11), table=(9, 7), N=70, c=17),
    replace(SMALL, name="own-table-2022", align_corners=False),
    replace(SMALL, name="larger-table", h=1, size=(4, 33), table=(11, 150), N=5, align_corners=False),
    replace(SMALL, name="half", dtype=torch.float16, N=66, c=32, contiguous=False),
    replace(SMALL, name="96-channels", h=1, c=96, N=40, contiguous=False),
    replace(SMALL, name="128-channels", h=1, c=128, N=3),
]


def run(script, **env):
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def attend(sample, tensors):
    """Output and gradients of the interpreted kernels, with uninitialised memory full of NaN."""
    from dat.ops import deform_attn_triton

    torch.use_deterministic_algorithms(True, warn_only=True)
    tensors = tensors if sample.table else [*tensors, None]
    options = list(sample.size), 0.4, sample.align_corners
    out, lse = deform_attn_triton.forward(*tensors, *options)
    return out, *deform_attn_triton.backward(output_gradient(sample), *tensors, out, lse, *options)


def interpret():
    """Every sample in several chunks of keys, and sums in several parts, where it is large enough."""
    from dat.ops import deform_attn_triton

    deform_attn_triton.CHUNK_BYTES, deform_attn_triton.PROGRAMS, deform_attn_triton.TABLE_PROGRAMS = 1, 8, 30
    for sample in SAMPLES:
        tensors = sample.tensors()
        ours = attend(sample, tensors)
        wide = [t.double() for t in tensors]
        exact = (
            reference.deform_attn(*wide, **sample.kwargs),
            *reference.deform_attn_backward(output_gradient(sample).double(), *wide, **sample.kwargs),
        )
        for one, other in zip(ours, exact, strict=True):
            close(one, other, TOLERANCE[sample.dtype])
        print("equal", sample.name)


def interpret_not_finite():
    """Positions that are not numbers have no bias, as those far away."""
    sample = Sample("not-finite", B=1, h=1, g=1)
    tensors = sample.tensors()
    tensors[3][0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    far = [*tensors[:3], tensors[3].nan_to_num(1e6, 1e6, -1e6), tensors[4]]
    for one, other in zip(attend(sample, tensors), attend(sample, far), strict=True):
        assert torch.equal(one, other)


def interpret_low_scores():
    """Tiles reach beyond the last key, whose score of 0 is far above those of these keys."""
    sample = replace(SMALL, reach=1.0)
    *tensors, table = sample.tensors()
    for one, other in zip(attend(sample, [*tensors, table - 300]), attend(sample, [*tensors, table]), strict=True):
        close(one, other.double(), 1e-4)


def interpret_table():
    """Tables that are not finite. The interpreter takes a second for a few queries and keys."""
    other = replace(TABLES[1], size=(4, 6), N=12)
    for sample, bad in ((TABLES[0], float("nan")), (TABLES[0], -float("inf")), (other, float("inf"))):
        check_table(lambda tensors, grad, sample=sample: attend(sample, tensors), sample, bad)


def interpret_unseen_rows():
    """Rows of the table that only queries beyond the map, in the last tile, would look up."""
    sample = Sample("unseen", B=1, h=1, g=1, size=(3, 3), table=(9, 9), N=4, c=16)
    *tensors, positions, table = sample.tensors()
    positions = positions.clamp(-0.1, 0.1)
    for bad in (float("nan"), float("inf")):
        spoiled = table.clone()
        spoiled[:, -1] = bad
        for one, other in zip(*(attend(sample, [*tensors, positions, rows]) for rows in (spoiled, table)), strict=True):
            assert torch.equal(one, other)


def compile_for_sm_90(kernel, types, constants):
    """Bytes of shared memory and of stack that a kernel takes; arguments are ints unless `types` says otherwise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    options = {name: value for name, value in constants.items() if name not in names}
    options["enable_fp_fusion"] = True
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # Steps and channels are multiples of 16, as in models, and memory is aligned.
    aligned = [n for n in names if signature[n].startswith("*") or n == "C" or n[1:] in ("_image", "_head", "_row")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return compiled.metadata.shared, int(re.search(r"STACK:(\d+)", usage)[1])


def compile_kernels(dtype, kind, channels):
    """(name, shared memory, stack) of every kernel as compiled for sm_90, in bytes."""
    from dat.ops import deform_attn_triton as kernels

    query, key, _, positions, table = Sample("compiled", c=channels, dtype=dtype).tensors()
    call = kernels.Call(query, key, positions, table, [5, 7], True)
    types = dict.fromkeys(("query", "key", "value", "out", "grad", "grad_query", "grad_scores"), "*" + kind)
    floats = ("coefficients", "key_pixels", "lse", "dots", "sums", "table", "positions", "grad_table")
    types |= dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(("scale", "start_x", "step_x", "inverse_x", "start_y", "step_y", "inverse_y"), "fp32")
    for kernel, constants in (
        (kernels.prepare_kernel, {"BLOCK": 256}),
        (kernels.forward_kernel, call.constants | call.tile),
        (kernels.query_kernel, call.constants | call.tile),
        (kernels.key_kernel, call.constants | call.key_tile),
        (kernels.table_kernel, {"V": kernels.COLUMNS, "K": kernels.TABLE_KEYS, "num_warps": 1}),
    ):
        yield kernel.__name__, *compile_for_sm_90(kernel, types, constants)


def test_interpreted_kernels_equal_the_reference():
    done = run(
        "from ops.test_deform_attn_triton import *; interpret(); interpret_not_finite(); interpret_low_scores(); "
        "interpret_table(); interpret_unseen_rows()",
        TRITON_INTERPRET="1",
    )
    assert done.count("equal") == len(SAMPLES)


# Bytes of registers that a thread may spill.
@pytest.mark.parametrize(("dtype", "kind", "channels", "spilled"), RESOURCES)
def test_kernels_compiled_for_sm_90_fit_its_registers_and_the_shared_memory_of_small_gpus(
    dtype, kind, channels, spilled, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = list(compile_kernels(dtype, kind, channels))
    assert list(tmp_path.iterdir())
    assert len(compiled) == 5
    for name, shared, stack in compiled:
        assert shared <= 99 * 1024, name
        assert stack <= spilled, name
