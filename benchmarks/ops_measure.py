"""Time, memory and error of implementations of one workload; growth with its size; scaling with threads."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ops_work
from benchmarks.ops_peers import EXACT, OURS, Implementation
from benchmarks.ops_work import Work
from benchmarks.timing import PASSES, exponent, medians, peak_bytes

# Few pixels, so that work per pixel does not hide the growth with queries.
GROWTH_SHAPES = ((8, 10), (4, 5), (2, 3), (1, 2))
GROWTH_QUERIES = (2048, 4096, 8192, 16384, 32768)
GROWTH_SIZE, GROWTH_BATCHES = (320, 480), (1, 2, 4, 8)
# Time on a GPU grows only once the GPU is full.
GPU_FACTOR = 32


def run_of(name: str, implementation: Implementation, work: Work) -> Callable[[], Any]:
    """A pass, by its name in `PASSES`, on tensors in the implementation's own layout."""
    return PASSES[name](partial(implementation.function, work), _own_tensors(implementation, work))


def _own_tensors(implementation: Implementation, work: Work) -> list[Tensor]:
    return [
        t.detach().clone(memory_format=torch.contiguous_format) for t in implementation.prepare(work, *work.tensors)
    ]


def measure(
    section: str, work: Work, implementations: Sequence[Implementation], device: torch.device, budget: float
) -> list[dict[str, Any]]:
    """A row for each implementation and dtype.

    A row's `forward_ours` and `forward_backward_ours` say how many times as fast this package's op of that dtype is.
    """
    pairs = [(i, dtype) for i in implementations for dtype in i.dtypes]
    works = {dtype: work.to(dtype) for _, dtype in pairs}
    rows = [
        {
            "section": section,
            "op": work.op,
            "work": work.name,
            "batch": work.batch,
            "implementation": i.name,
            "dtype": str(dtype).removeprefix("torch."),
            "ours": i.ours,
        }
        for i, dtype in pairs
    ]
    for name in PASSES:
        runs = {f"{i.name} {dtype}": run_of(name, i, works[dtype]) for i, dtype in pairs}
        seconds = list(medians(runs, device, budget=budget / 2).values())
        ours = {row["dtype"]: s for row, s in zip(rows, seconds, strict=True) if row["ours"]}
        for row, s, run in zip(rows, seconds, runs.values(), strict=True):
            row[f"{name}_ms"] = round(s * 1e3, 4)
            row[f"{name}_ours"] = round(s / ours[row["dtype"]], 3)
            row[f"{name}_peak_bytes"] = peak_bytes(run, device)
    for dtype, exact_work in works.items():
        exact = _results(EXACT[work.op], exact_work.to(torch.float64))
        for row, (i, own) in zip(rows, pairs, strict=True):
            if own == dtype:
                row["error"], row["gradient_error"] = _errors(_results(i, exact_work), exact)
    return rows


def _results(implementation: Implementation, work: Work) -> list[Tensor]:
    """The output and its gradients, in this package's layout."""
    tensors = [t.detach().requires_grad_() for t in work.tensors]
    out = implementation.restore(work, implementation.function(work, *implementation.prepare(work, *tensors)))
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def _errors(results: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Largest error of the output over its largest number, and the worst tensor's mean gradient error over its mean.

    The gradient with respect to a location jumps where a sample crosses from one pixel to the next, and rounding
    decides the side. A mean hardly sees the few samples that are so close.
    """
    out, *gradients = ((r.double() - e, e) for r, e in zip(results, exact, strict=True))
    error = (out[0].abs().max() / out[1].abs().max()).item()
    return error, max((d.abs().mean() / e.abs().mean()).item() for d, e in gradients)


def growth(device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """How time and memory of the fused op grow with queries, at fixed levels, and with images."""
    factor = GPU_FACTOR if device.type == "cuda" else 1
    queries = [factor * q for q in GROWTH_QUERIES]
    batches = [factor * b for b in GROWTH_BATCHES]
    shapes = ops_work.levels(GROWTH_SIZE)
    by_queries = {q: ops_work.attention("", GROWTH_SHAPES, q, device) for q in queries}
    by_batches = {b: ops_work.attention("", shapes, None, device, b) for b in batches}
    for variable, works in (("Q", by_queries), ("B", by_batches)):
        for name in PASSES:
            runs = {str(size): run_of(name, OURS["attention"], work) for size, work in works.items()}
            seconds = list(medians(runs, device, 15, budget).values())
            memory = [peak_bytes(run, device) for run in runs.values()]
            yield {
                "section": "growth",
                "op": "attention",
                "variable": variable,
                "pass": name,
                "sizes": list(works),
                "ms": [round(s * 1e3, 4) for s in seconds],
                "peak_bytes": memory,
                "time_exponent": round(exponent(list(works), seconds), 3),
                "memory_exponent": None if None in memory else round(exponent(list(works), memory), 3),
            }


def scaling(works: Sequence[Work], device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """How much faster the fused op is on 2, 4, ... threads, up to those that torch uses, than on one."""
    most = torch.get_num_threads()
    counts = [2**i for i in range(most.bit_length())]

    def with_threads(run: Callable[[], Any], count: int) -> Callable[[], Any]:
        def timed() -> None:
            torch.set_num_threads(count)
            run()

        return timed

    for work in works:
        for name in PASSES:
            run = run_of(name, OURS[work.op], work)
            try:
                seconds = medians({str(n): with_threads(run, n) for n in counts}, device, 15, budget)
            finally:
                torch.set_num_threads(most)
            yield {
                "section": "threads",
                "op": work.op,
                "work": work.name,
                "pass": name,
                "threads": counts,
                "ms": [round(s * 1e3, 4) for s in seconds.values()],
                "speedups": [round(seconds["1"] / s, 3) for s in seconds.values()],
            }
