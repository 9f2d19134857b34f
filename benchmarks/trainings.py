"""Trainings by the project's own commands, which go on where they stopped, and what their logs say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def entries(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, none where there is no run yet."""
    log = run / "log.jsonl"
    if not log.exists():
        return []
    # a run that is at it, or was killed, may have half a line at the end
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def last_entries(run: Path) -> dict[str, Any]:
    """The last training and validation lines of a run's log.jsonl."""
    return {entry["kind"]: entry for entry in entries(run)}


def finished(run: Path, epochs: int) -> bool:
    """Whether the last of `epochs` was evaluated."""
    return last_entries(run).get("val", {}).get("epoch") == epochs


def arguments(values: dict[str, Any]) -> list[str]:
    """Values by "key.path" as commands take them; text as it is, everything else as JSON."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def train(
    module: str, config: str | Path, run: Path, epochs: int, overrides: dict[str, Any], log: Path | None = None
) -> None:
    """Trains in a process of its own as far as it is not done yet; a run that is finished stays as it is.

    Args:
        module: the command, "detection.train" or "classification.train".
        config: its YAML file.
        run: folder of the run, key `output`.
        epochs: of the whole run.
        overrides: values by "key.path".
        log: where what the command prints goes, None: to the console.
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
