"""NATTEN 0.14 as a peer of `neighborhood_attn`, in a Python of its own, because it needs an old torch.

Its setup compiles without OpenMP, and its CPU kernels then run on one thread. Build it with -fopenmp to compare on as
many threads as ours. `cores` measures which of the two it is.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.process import Process, serve
from benchmarks.timing import PASSES, memory_kept, seconds_of


class Natten(Process):
    """NATTEN in another Python, 3.10 or later; a context manager that ends the process.

    Attributes:
        versions: of natten and torch there.

    Raises:
        OSError: `python` cannot be run.
        ProcessEnded: the process ended; its message is on the standard error.
    """

    def __init__(self, python: str, threads: int) -> None:
        super().__init__("benchmarks.natten_peer", [str(threads)], python)
        self.versions: dict[str, str] = self.ask("versions")

    def load(self, tensors: list[Tensor], **options: Any) -> None:
        """Keeps these tensors, in their memory layout, and keyword arguments of `attention` for the next calls."""
        with tempfile.TemporaryDirectory() as folder:
            torch.save(tensors, f"{folder}/tensors")
            self.ask("load", f"{folder}/tensors", options)

    def output(self) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            self.ask("output", f"{folder}/output")
            return torch.load(f"{folder}/output", weights_only=True)

    def cores(self) -> float:
        """Processor seconds in a second of forward passes: about 1 if the kernels run on one thread."""
        return self.ask("cores")


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, size: tuple[int, int], kernel_size: int, scale: float
) -> Tensor:
    """`dat.ops.neighborhood_attn` by NATTEN."""
    from natten.functional import natten2dav, natten2dqkrpb

    query, key, value = (t.unflatten(2, tuple(size)) for t in (query, key, value))
    scores = natten2dqkrpb(query * scale, key, bias, kernel_size, 1)
    return natten2dav(scores.softmax(-1), value, kernel_size, 1).flatten(2, 3)


class Work:
    """The functions that the process of `Natten` answers with."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.function: Callable[..., Tensor] = attention
        self.tensors: list[Tensor] = []

    def versions(self) -> dict[str, str]:
        import natten

        return {"natten": natten.__version__, "torch": torch.__version__}

    def load(self, file: str, options: dict[str, Any]) -> None:
        self.tensors = torch.load(file, weights_only=True)
        self.function = partial(attention, **options)
        self.runs = {name: make(self.function, self.tensors) for name, make in PASSES.items()}

    def output(self, file: str) -> None:
        with torch.no_grad():
            torch.save(self.function(*self.tensors), file)

    def seconds(self, name: str, calls: int) -> float:
        return seconds_of(self.runs[name], calls, torch.device("cpu"))

    def cores(self) -> float:
        run = self.runs["forward"]
        run()
        wall, processors = time.perf_counter(), time.process_time()
        for _ in range(3):
            run()
        return (time.process_time() - processors) / (time.perf_counter() - wall)


if __name__ == "__main__":
    work = Work(int(sys.argv[1]))
    # As `medians` times ours.
    with memory_kept():
        serve({name: getattr(work, name) for name in ("versions", "load", "output", "seconds", "cores")})
