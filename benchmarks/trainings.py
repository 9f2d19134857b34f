"""Trainings by the project's own commands, which continue after an interruption, and their logs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def entries(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; none if there is no run yet."""
    log = run / "log.jsonl"
    if not log.exists():
        return []
    # A run in progress, or one that was killed, may end with half a line.
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def last_entries(run: Path) -> dict[str, Any]:
    """The last training and validation lines of a run's log.jsonl."""
    return {entry["kind"]: entry for entry in entries(run)}


def finished(run: Path, epochs: int) -> bool:
    """Whether the last of `epochs` was evaluated."""
    return last_entries(run).get("val", {}).get("epoch") == epochs


def arguments(values: dict[str, Any]) -> list[str]:
    """Values by "key.path" as arguments of a command; text as it is, everything else as JSON."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def train(
    module: str, config: str | Path, run: Path, epochs: int, overrides: dict[str, Any], log: Path | None = None
) -> None:
    """Trains the remaining epochs in a process of its own; a finished run stays as it is.

    Args:
        module: the command, "detection.train" or "classification.train".
        config: its YAML file.
        run: folder of the run, key `output`.
        epochs: of the whole run, earlier ones included.
        overrides: values by "key.path".
        log: file for the output of the command; None: the console.
    Raises:
        RuntimeError: the command failed.
    """
    if finished(run, epochs):
        return
    values = {"output": str(run), "train.epochs": epochs, "train.resume": True, **overrides}
    command = [sys.executable, "-m", module, str(config), *arguments(values)]
    out = None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        code = subprocess.run(command, check=False, stdout=out, stderr=out).returncode
    finally:
        if out is not None:
            os.close(out)
    if code:
        where = "" if log is None else f", see {log}"
        raise RuntimeError(f"{' '.join(command)} ended with exit status {code}{where}")
