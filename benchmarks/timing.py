"""Interleaved timing of peers, and the description of the machine that a result belongs to."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What a reader needs to compare figures: processor, threads, GPU and versions."""
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


def medians(
    runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 7, budget: float = 60.0
) -> dict[str, float]:
    """Median seconds of each run; runs take turns, so that a change of the machine's speed meets them all.

    Slow runs are repeated less often, so that all take about `budget` seconds, but never less than three times.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    for repeat in range(repeats):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
        if repeat >= 2 and time.perf_counter() - begin > budget:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows with the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    temporary.replace(path)
