"""NATTEN 0.14 as a peer of `neighborhood_attn`, in a Python of its own, since it needs a torch of its time.

Both ends of a pipe: `Natten` here, and `serve`, which it starts there. Requests are JSON lists, answers JSON values,
one a line. Between requests the other process does nothing, so that runs here and there can take turns.

    ["load", FILE, OPTIONS]  take query, key, value and bias from a file, and the keyword arguments of `attention`
    ["output", FILE]         write its output
    ["time", PASS, CALLS]    the seconds of one of so many calls in a row, a pass of `benchmarks.timing.PASSES`
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import PASSES, seconds_of

ROOT = Path(__file__).parents[1]


class Natten:
    """NATTEN in another Python, 3.10 or later; a context manager that ends the process.

    Attributes:
        versions: of natten and torch there.

    Raises:
        OSError: `python` can't be run.
        RuntimeError: the process ended; what it had to say is on the standard error.
    """

    def __init__(self, python: str, threads: int):
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._command = [python, "-m", "benchmarks.natten_peer", str(threads)]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.versions = self._answer()

    def __enter__(self) -> "Natten":
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.communicate()

    def load(self, tensors: list[Tensor], **options: Any) -> None:
        """Take these for all that follows, laid out in memory as they are here."""
        with tempfile.TemporaryDirectory() as folder:
            torch.save(tensors, f"{folder}/tensors")
            self._ask("load", f"{folder}/tensors", options)

    def output(self) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            self._ask("output", f"{folder}/output")
            return torch.load(f"{folder}/output", weights_only=True)

    def seconds(self, name: str, calls: int) -> float:
        """Seconds of one of several calls in a row."""
        return self._ask("time", name, calls)

    def _ask(self, *request: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It has ended, and `_answer` says so.
            pass
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended with exit status {self._process.wait()}")
        return json.loads(line)


def serve(threads: int) -> None:
    """Answers the requests on standard input."""
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    # Here, since the other end has no NATTEN.
    import natten
    from natten.functional import natten2dav, natten2dqkrpb

    def attention(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, size: list[int], kernel_size: int, scale: float
    ) -> Tensor:
        query, key, value = (t.unflatten(2, tuple(size)) for t in (query, key, value))
        scores = natten2dqkrpb(query * scale, key, bias, kernel_size, 1)
        return natten2dav(scores.softmax(-1), value, kernel_size, 1).flatten(2, 3)

    torch.set_num_threads(threads)
    answer: Any = {"natten": natten.__version__, "torch": torch.__version__}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        answer = None
        if request == "load":
            tensors = torch.load(arguments[0], weights_only=True)
            function = partial(attention, **arguments[1])
            runs = {name: make(function, tensors) for name, make in PASSES.items()}
        elif request == "output":
            with torch.no_grad():
                torch.save(function(*tensors), arguments[0])
        elif request == "time":
            answer = seconds_of(runs[arguments[0]], arguments[1], torch.device("cpu"))
        else:
            raise ValueError(f"request must be load, output or time, got {request}")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
