"""The CPU kernels of every instruction set, each in a process that may not use a better one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ops import test_deform_attn_op, test_neighborhood_attn
from ops.samples import SAMPLES

from dat.ops import MISSING, deform_sample, reference
from dat.ops.__main__ import main

ROOT = Path(__file__).parents[2]
ORDER = ("DEFAULT", "AVX2", "AVX512")
WINDOWS = {
    "torch.float32", "strided-torch.bfloat16", "kernel-7", "dilation-2-torch.float16", "several-bands-and-registers",
}  # fmt: skip


def check_sampling():
    """Batches of one, several and many rows, whole and broken registers, for vectors of any width."""
    for L, P in ((1, 1), (1, 3), (2, 3), (1, 9), (3, 7)):
        for D in (1, 5, 24, 96):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                sample = replace(SAMPLES[0], D=D, P=P, shapes=((5, 7), (3, 1), (1, 1))[:L], dtype=dtype)
                value, *rest = (t.requires_grad_() for t in sample.tensors())
                out = deform_sample(value, sample.shapes, *rest)
                grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
                found = out, *torch.autograd.grad(out, (value, *rest), grad)
                exact = [t.detach().double() for t in (value, *rest)]
                expected = (
                    reference.deform_sample(exact[0], sample.shapes, *exact[1:]),
                    *reference.deform_sample_backward(grad.double(), exact[0], sample.shapes, *exact[1:]),
                )
                for ours, theirs in zip(found, expected, strict=True):
                    limit = {8: 1e-12, 4: 5e-6, 2: 1e-2}[dtype.itemsize] * theirs.abs().max()
                    assert (ours.double() - theirs).abs().max() <= limit, sample


def check(report):
    """Holds the kernels of this process against the reference; the report of `python -m dat.ops` does so as well."""
    torch.set_num_threads(1)
    check_sampling()
    for sample in test_neighborhood_attn.SAMPLES:
        if sample.name in WINDOWS:
            test_neighborhood_attn.test_forward_and_gradients_equal_the_reference_in_float64(sample, "cpu")
    test_deform_attn_op.test_positions_that_are_not_numbers_have_no_bias("cpu")
    # Deterministic mode fills empty tensors with NaN: an element that a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for sample in test_deform_attn_op.SAMPLES:
        test_deform_attn_op.test_forward_and_gradients_equal_the_reference_in_float64(sample, "cpu")
    assert main(["--json", report]) == 0


def run(capability, code):
    environment = {**os.environ, "DAT_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(bool(MISSING["_C_cpu"]), reason="the CPU library was not built")
@pytest.mark.parametrize("capability", [name for name in ORDER if name not in torch.backends.cpu.get_cpu_capability()])
def test_kernels_of_other_instruction_sets(capability, tmp_path):
    """A process takes the best that the machine has and DAT_CPU_CAPABILITY allows; all other tests take the best."""
    report = tmp_path / "report.json"
    done = run(capability, f"from ops.test_instruction_sets import check; check({str(report)!r})")
    assert done.returncode == 0, done.stdout + done.stderr
    used = json.loads(report.read_text())["processor"]["instruction set"]
    best = next(name for name in reversed(ORDER) if name in torch.backends.cpu.get_cpu_capability())
    assert used == min(capability, best, key=ORDER.index)


@pytest.mark.skipif(bool(MISSING["_C_cpu"]), reason="the CPU library was not built")
@pytest.mark.skipif("DAT_CPU_CAPABILITY" in os.environ, reason="the set was chosen")
def test_this_process_takes_the_best_instruction_set(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "report.json")]) == 0
    used = json.loads((tmp_path / "report.json").read_text())["processor"]["instruction set"]
    assert used in torch.backends.cpu.get_cpu_capability()
    check_sampling()


def test_unknown_instruction_sets_are_refused():
    done = run("avx2", "import runpy; runpy.run_module('dat.ops', run_name='__main__')")
    assert done.returncode == 1
    assert "DAT_CPU_CAPABILITY must be DEFAULT, AVX2 or AVX512, got avx2" in done.stdout + done.stderr
