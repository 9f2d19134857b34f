"""Interleaved timing of peers, peak memory, growth, a description of the machine, and types of commands' arguments.

It needs only torch, so that a peer in another environment can measure itself with it.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Long enough that reading the clock and waking a GPU do not matter.
TURN_SECONDS = 0.05


def machine() -> dict[str, Any]:
    """Processor, threads, GPU and versions, which a reader needs to compare figures."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def forward_of(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """A function that calls the forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            function(*tensors)

    return run


def backward_of(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """A function that calls forward and takes gradients with respect to all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves))

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return run


PASSES = {"forward": forward_of, "forward_backward": backward_of}


def medians(
    runs: dict[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 7,
    budget: float = 60.0,
    elsewhere: dict[str, Callable[[int], float]] | None = None,
) -> dict[str, float]:
    """Median seconds of each run. Runs take turns, so that a change of the machine's speed affects all of them.

    A run that is quicker than `TURN_SECONDS` is called several times a turn. Slow runs get fewer turns, at least three,
    so that all together take about `budget` seconds. On a CPU, freed memory is kept for later calls (`memory_kept`).
    Runs in other processes are given as functions of a number of calls that return what `seconds_of` returns.
    """
    timers = {name: partial(seconds_of, run, device=device) for name, run in runs.items()} | (elsewhere or {})
    calls = {}
    times: dict[str, list[float]] = {name: [] for name in timers}
    with memory_kept() if device.type == "cpu" else contextlib.nullcontext():
        for name, timer in timers.items():
            seconds = timer(1)
            # The first call may fill caches; that does not matter for a call as slow as this.
            if seconds < 1:
                seconds = timer(1)
            calls[name] = max(1, min(100, int(TURN_SECONDS / seconds)))
        begin = time.perf_counter()
        for repeat in range(repeats):
            for name, timer in timers.items():
                # The first of several calls finds caches and memory as the previous run left them.
                if calls[name] > 1:
                    timer(1)
                times[name].append(timer(calls[name]))
            if repeat >= 2 and time.perf_counter() - begin > budget:
                break
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of one of several calls in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call, its results included, beyond the memory in use before it.

    On a GPU this is the memory of torch's allocator. On a CPU it is the resident memory of the process, whether torch,
    a library or a kernel allocated it; None on systems other than Linux. Call `run` once before, to fill its caches.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Freed memory that the C library kept would be used again without being counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    # Resets the peak to the current resident memory (proc(5)).
    reset.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Lets glibc keep all freed memory for later calls, as torch's allocator does on a GPU.

    Otherwise large results are allocated from the system again, page by page, at a cost that depends on earlier calls
    and is not the op's.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 65536)
        # glibc itself raises the threshold to this after large tensors were freed.
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)
        libc.malloc_trim(0)


def _resident(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return 1024 * int(match[1])


def exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """The exponent of the growth with size, by least squares on logarithms."""
    slope, _ = statistics.linear_regression([math.log(s) for s in sizes], [math.log(a) for a in amounts])
    return slope


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows, one a line, with the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = ",\n".join(map(json.dumps, rows))
    temporary.write_text(f'{{"machine": {json.dumps(machine())}, "rows": [\n{lines}\n]}}\n')
    temporary.replace(path)


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A type of arguments: names with commas between, all of them known."""

    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {', '.join(unknown)}")
        return text.split(",")

    return names


def integers(text: str) -> list[int]:
    """A type of arguments: integers with commas between, or nothing."""
    return [int(part) for part in text.split(",") if part]


def device(text: str) -> torch.device:
    """A type of arguments: a device that this machine has."""
    try:
        torch.empty(0, device=text)
    # torch without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(text)
