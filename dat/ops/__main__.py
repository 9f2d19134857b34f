"""The report of `python -m dat.ops` for bug reports: it lists the available back ends and tests the ops.

The self-test compares each op, forward and backward, in every dtype on every device with the float64 reference.
It takes seconds, half a minute where Triton compiles for the first time; the exit code is 1 where it fails.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import collect_env

import dat
from dat.ops import MISSING, deform_attn, deform_sample, ms_deform_attn, neighborhood_attn, reference
from dat.ops._common import why_no_triton
from dat.ops._library import find

# The largest error that passes, as a part of the largest value of the reference: some roundings of the dtype.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = ((16, 32), (8, 16))
OPS = ("deform_sample", "ms_deform_attn", "deform_attn", "neighborhood_attn")
ARCHITECTURES = re.compile(rb"\0(\d+\.\d[af]?(?:\+PTX)?(?:[; ]\d+\.\d[af]?(?:\+PTX)?)*)\0")


def versions() -> dict[str, str]:
    return {
        "dat": dat.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "system": platform.platform(),
    }


def processor() -> dict[str, str]:
    return {
        "CPU": _cpu_name(),
        "instruction set": instruction_set(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def instruction_set() -> str:
    """The one that the CPU library's kernels use here; DAT_CPU_CAPABILITY=DEFAULT or AVX2 asks for less."""
    if MISSING["_C_cpu"]:
        return f"{torch.backends.cpu.get_cpu_capability()} (torch's)"
    return torch.ops.dat.cpu_capability()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def libraries() -> dict[str, str]:
    """The path of each library or the reason why it is unused, and the architectures of the CUDA library."""
    found = {}
    for name, why in MISSING.items():
        path = find(name)
        found[name] = f"not in use: {why}" if why else str(path)
        if name == "_C_cuda" and path:
            found["architectures"] = architectures(path) or "unknown"
    if torch.cuda.is_available():
        why = why_no_triton()
        found["Triton"] = f"not in use: {why}" if why else import_module("triton").__version__
    return found


def architectures(library: Path) -> str | None:
    """The list in torch's form that setup.py compiled into a CUDA library, such as "8.0;9.0+PTX"."""
    found = ARCHITECTURES.search(library.read_bytes())
    return found[1].decode() if found else None


def covers(built: str, capability: tuple[int, int]) -> bool:
    """Whether code built for the list `built` runs on a device of a compute capability.

    Machine code runs on later devices of its major version ("9.0a" only on its own), PTX on all later ones.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", built):
        version = int(major), int(minor)
        later = version < capability and suffix != "a" and (bool(ptx) or version[0] == capability[0])
        if version == capability or later:
            return True
    return False


def gpus() -> dict[str, str]:
    """Every CUDA device and whether the library has code for it; where there is none, why."""
    if not torch.cuda.is_available():
        return {"none": _why_no_gpu()}
    path = find("_C_cuda")
    built = architectures(path) if path and MISSING["_C_cuda"] is None else None
    found = {"driver": collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if MISSING["_C_cuda"]:
            served = "on the PyTorch reference, no library"
        elif built is None:
            served = "architectures of the library unknown"
        else:
            served = "covered by the library" if covers(built, capability) else f"NOT covered by the library: {built}"
        name = torch.cuda.get_device_name(index)
        found[f"cuda:{index}"] = f"{name}, compute capability {capability[0]}.{capability[1]}, {served}"
    return found


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return "torch.cuda.is_available() is False"


@dataclasses.dataclass(frozen=True)
class Result:
    """One op in one dtype on one device; errors as parts of the reference's largest value, None where it raised."""

    device: str
    op: str
    dtype: str
    kernel: str
    forward: float | None
    backward: float | None
    limit: float
    raised: str | None = None

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return all(error is not None and error <= self.limit for error in (self.forward, self.backward))


@dataclasses.dataclass(frozen=True)
class Case:
    """An op as a function of its tensors, its reference, and the tensors."""

    op: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def cases(dtype: torch.dtype) -> list[Case]:
    """Calls of every op with tensors on the CPU."""
    return [*sampling_cases(dtype), *attention_cases(dtype)]


def sampling_cases(dtype: torch.dtype) -> list[Case]:
    """Inputs for which every location is exact in each dtype and never on the edge of a pixel.

    A location rounded across an edge would see another pixel, and its gradient jumps there. D = 32, and 64 without
    weights, run specialised kernels, D = 5 the general one; locations reach beyond the map.
    """

    def with_shapes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda value, *rest: function(value, SHAPES, *rest)

    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    B, Q, H, L, P = 2, 60, 4, len(SHAPES), 4
    S = sum(h * w for h, w in SHAPES)
    sizes = torch.tensor([[w, h] for h, w in SHAPES], dtype=real)
    points = torch.randint(0, 9, (B, Q, L, 2), generator=generator).to(real) / 8
    boxes = torch.cat((points, 0.25 * torch.randint(1, 3, (B, Q, L, 2), generator=generator).to(real)), -1)
    offsets = (torch.randint(-32, 32, (B, Q, H, L, P, 2), generator=generator).to(real) + 0.5) / 4
    logits = torch.randn(B, Q, H, L, P, generator=generator).to(dtype)
    locations = points[:, :, None, :, None] + offsets / sizes[:, None]
    weights = logits.to(real).flatten(-2).softmax(-1).view_as(logits)
    wide = torch.randn(B, S, H, 32, generator=generator).to(dtype)
    odd = torch.randn(B, S, H, 5, generator=generator).to(dtype)
    wider = torch.randn(B, S, H, 64, generator=generator).to(dtype)
    sample = (with_shapes(deform_sample), with_shapes(reference.deform_sample))
    attend = (with_shapes(ms_deform_attn), with_shapes(reference.ms_deform_attn))
    return [
        Case("deform_sample", *sample, (wide, locations, weights)),
        Case("deform_sample", *sample, (odd, locations)),
        Case("deform_sample", *sample, (wider, locations)),
        Case("ms_deform_attn", *attend, (wide, points, offsets.to(dtype), logits)),
        Case("ms_deform_attn", *attend, (odd, boxes, offsets.to(dtype), logits)),
    ]


def attention_cases(dtype: torch.dtype) -> list[Case]:
    """Two images of two heads of 32 channels: positions in the middle between pixels, and windows of 3x3 pixels."""
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    B, h, H, W, N, c = 2, 2, 9, 17, 20, 32
    query, *pixels = (torch.randn(B, h, H * W, c, generator=generator).to(dtype) for _ in range(3))
    keys = [torch.randn(B, h, N, c, generator=generator).to(dtype) for _ in range(2)]
    steps = torch.randint(0, 8, (B, 1, N, 2), generator=generator).to(real)
    positions = (2 * steps + 1) / torch.tensor([W - 1, H - 1]) - 1
    table = torch.randn(h, 2 * H - 1, 2 * W - 1, generator=generator).to(real)
    bias = torch.randn(h, 5, 5, generator=generator).to(real)
    options: dict[str, Any] = {"size": (H, W), "scale": c**-0.5}
    windows = options | {"kernel_size": 3}
    return [
        Case(
            "deform_attn",
            partial(deform_attn, **options),
            partial(reference.deform_attn, **options, align_corners=True),
            (query, *keys, positions, table),
        ),
        Case(
            "neighborhood_attn",
            partial(neighborhood_attn, **windows),
            partial(reference.neighborhood_attn, **windows, dilation=1),
            (query, *pixels, bias),
        ),
    ]


def run(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An op's output and its gradients by every tensor, for a fixed gradient of the output; all on the CPU."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    grads = torch.autograd.grad(out, leaves, grad.to(out))
    return out.detach().cpu(), tuple(by.cpu() for by in grads)


def largest_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest expected value."""
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def kernel(device: str, op: str, dtype: torch.dtype) -> str:
    """What computes an op: the library for the device, Triton or PyTorch."""
    key = torch.device(device).type.upper()
    if key == "CUDA" and op in ("deform_attn", "neighborhood_attn"):
        return "PyTorch" if dtype == torch.float64 or why_no_triton() else "Triton"
    return "library" if torch._C._dispatch_has_kernel_for_dispatch_key(f"dat::{op}", key) else "PyTorch"


def check_op(device: str, op: str, dtype: torch.dtype) -> Result:
    name = str(dtype).removeprefix("torch.")
    result = Result(device, op, name, kernel(device, op, dtype), None, None, LIMITS[dtype])
    forward, backward = [], []
    for case in cases(dtype):
        if case.op != op:
            continue
        expected, expected_grads = run(case.reference, [tensor.double() for tensor in case.tensors])
        try:
            out, grads = run(case.function, [tensor.to(device) for tensor in case.tensors])
        except RuntimeError as error:
            return dataclasses.replace(result, raised=str(error).strip().splitlines()[0])
        forward.append(largest_error(out, expected))
        backward += [largest_error(got, by) for got, by in zip(grads, expected_grads, strict=True)]
    # torch's maximum, unlike Python's, is NaN where one is.
    return dataclasses.replace(
        result, forward=torch.tensor(forward).max().item(), backward=torch.tensor(backward).max().item()
    )


def self_test() -> list[Result]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [check_op(device, op, dtype) for device in devices for op in OPS for dtype in LIMITS]


def section(title: str, entries: dict[str, str]) -> str:
    width = max(map(len, entries))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in entries.items())])


def table(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = [("device", "op", "dtype", "kernel", "forward", "backward", "limit", "")]
    for result in results:
        errors = ("-" if error is None else f"{error:.1e}" for error in (result.forward, result.backward))
        verdict = "passed" if result.passed else f"FAILED {result.raised or ''}".rstrip()
        rows.append((result.device, result.op, result.dtype, result.kernel, *errors, f"{result.limit:.0e}", verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dat.ops", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {
        "versions": versions(),
        "processor": processor(),
        "libraries": libraries(),
        "GPUs": gpus(),
    }
    for title, entries in report.items():
        print(section(title, entries), end="\n\n")
    results = self_test()
    print("self-test: largest error against the float64 reference, as a part of its largest value")
    print(table(results))
    failures = sum(not result.passed for result in results)
    print(f"\n{failures} of {len(results)} FAILED" if failures else f"\nall {len(results)} passed")
    if options.json:
        report["self-test"] = [dataclasses.asdict(result) | {"passed": result.passed} for result in results]
        options.json.write_text(json.dumps(report, indent=2))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
