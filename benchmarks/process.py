"""Implementations in processes of their own, which take turns: each has its own libraries and may run out of memory.

A process reads a JSON list from each line of its standard input, runs the function that it names, and answers with a
line of JSON. This module imports only torch, so that a process may run with an old one.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import medians, memory_kept, peak_bytes, seconds_of

ROOT = Path(__file__).resolve().parents[1]


class ProcessEnded(RuntimeError):
    """A process ended without an answer; the message says how."""


class Process:
    """A module of this package that runs under some interpreter and answers one question at a time.

    Args:
        module: its name, such as "benchmarks.model_process"; it calls `serve`.
        arguments: of its command line.
        python: the interpreter, this one by default; at least 3.10.
    """

    def __init__(self, module: str, arguments: Iterable[str] = (), python: str | Path = sys.executable) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._command = [str(python), "-m", module, *arguments]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # glibc returns freed memory at once, so resident memory is memory in use, without fragmentation. Times are
            # measured with all memory kept.
            env={**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        """Sends a question and waits for the answer. Raises ProcessEnded if the process ended, say, out of memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([name, *arguments]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
            raise ProcessEnded(f"{' '.join(self._command)} {how}")
        return json.loads(answer)

    def seconds(self, name: str, calls: int) -> float:
        """Seconds of one of several calls in a row of the pass `name`, as benchmarks.timing.seconds_of."""
        return self.ask("seconds", name, calls)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()


def serve(answers: Mapping[str, Callable[..., Any]]) -> None:
    """The side of the process: answers each question with the function of its name, until the input ends."""
    # Output of libraries must not mix with the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(answers[name](*arguments)), file=out, flush=True)


class Measured:
    """A model and the questions about it in its process. Its passes are "forward" and "step".

    Args:
        model: the module to measure.
        inputs: arguments of the model, on its device.
        loss: of the model's output in training.
        threads: of the CPU.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], loss: Callable[[Any], Tensor], threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.inputs, self.loss = model, inputs, loss
        self.device = next(model.parameters()).device
        self.kept: contextlib.AbstractContextManager[None] | None = None
        try:
            self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        # torch before 2.4 has it only for GPUs.
        except RuntimeError:
            self.optimizer = torch.optim.AdamW(model.parameters())

    def answers(self) -> dict[str, Callable[..., Any]]:
        return {"seconds": self.seconds, "peak": self.peak}

    def forward(self) -> Any:
        self.model.eval()
        with torch.no_grad():
            return self.model(*self.inputs)

    def step(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.loss(self.model(*self.inputs)).backward()
        self.optimizer.step()

    def seconds(self, name: str, calls: int) -> float:
        """Seconds of a pass, with memory kept between passes, as the allocators that torch recommends for CPUs do."""
        if self.kept is None:
            # This lasts until the process ends; memory is measured in another one.
            self.kept = memory_kept()
            self.kept.__enter__()
        return seconds_of(getattr(self, name), calls, self.device)

    def peak(self, name: str) -> float | None:
        """Peak memory of a pass beyond weights and inputs, in MB of 2**20 bytes."""
        return megabytes(peak_bytes(getattr(self, name), self.device))


def megabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 1)


def take_turns(processes: Mapping[str, Process], name: str, batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median times of a pass in each process, and the ratios of the others to the first."""
    elsewhere = {key: partial(process.seconds, name) for key, process in processes.items()}
    seconds = medians({}, torch.device("cpu"), repeats, math.inf, elsewhere)
    first = next(iter(seconds.values()))
    return {
        key: {"ms": round(s * 1e3, 1), "images_per_second": round(batch / s, 2), "ratio": round(s / first, 2)}
        for key, s in seconds.items()
    }


def peaks(start: Callable[[str], Process], names: Sequence[str], *question: Any) -> dict[str, dict[str, Any]]:
    """The peaks that processes answer, one after the other, and the ratios of the others to the first.

    The answer of a process that was killed, for example out of memory, says so.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        with start(name) as process:
            try:
                found[name] = {"mb": process.ask(*question)}
            except ProcessEnded as ended:
                found[name] = {"mb": None, "why": str(ended)}
    first = found[names[0]]["mb"]
    for value in found.values():
        if first and value["mb"]:
            value["ratio"] = round(value["mb"] / first, 2)
    return found
