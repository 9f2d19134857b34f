"""The records of a run: console and train.log, log.jsonl, TensorBoard, Weights & Biases and a progress bar."""

import json
import logging
import math
import resource
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dat.utils.errors import ConfigError
from dat.utils.files import atomic_write, read_jsonl
from dat.utils.progress import progress_bar
from dat.utils.text import printable


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


class RunLogger:
    """Writes the records of a run; only the main process writes.

    Args:
        output: folder of the run, created if missing.
        main: whether this process is the main one.
        resume_step: step from which the run is resumed; later entries of log.jsonl and TensorBoard are removed, and
            existing entries of this step are not written again. None starts new files.
        wandb_project: project of Weights & Biases for the same numbers and images, "": none.
        config: plain configuration for Weights & Biases.
    Raises:
        ConfigError: the package wandb is not installed, or refuses.
    """

    def __init__(
        self,
        output: str | Path,
        main: bool = True,
        resume_step: int | None = None,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.output, self.main = Path(output), main
        self._logger = logging.getLogger("dat.run")
        self._closing = ExitStack()
        self._known: set[tuple[str, int]] = set()
        self._wandb: Any = None
        if not main:
            return
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, self.output, resume_step is not None, config)
            self._closing.callback(self._wandb.finish)
        self.output.mkdir(parents=True, exist_ok=True)
        self._attach(logging.StreamHandler())
        mode = "w" if resume_step is None else "a"
        self._attach(_LogFile(self.output / "train.log", mode=mode, encoding="utf-8"))
        self._closing.enter_context(logging_redirect_tqdm())
        lines = self.output / "log.jsonl"
        self._known = _keep_until(lines, resume_step)
        self._lines = self._closing.enter_context(lines.open("a", encoding="utf-8"))
        # A new run purges from step 1 on: a run that ended before its first checkpoint may have left events.
        self._board = SummaryWriter(str(self.output / "tensorboard"), purge_step=(resume_step or 0) + 1)
        self._closing.callback(self._board.close)

    def _attach(self, handler: logging.Handler) -> None:
        handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        # Handlers are added to the root logger, because train.log includes warnings of timm and torch.
        logging.getLogger().addHandler(handler)
        self._logger.setLevel(logging.INFO)
        self._closing.callback(handler.close)
        self._closing.callback(logging.getLogger().removeHandler, handler)

    def info(self, message: str) -> None:
        """Writes one line to the console and train.log."""
        if self.main:
            self._logger.info(message)

    def warning(self, message: str) -> None:
        """Writes one line, marked as a warning, to the console and train.log."""
        if self.main:
            self._logger.warning("warning: %s", message)

    def log(self, kind: str, step: int, **numbers: float) -> None:
        """Appends {"kind", "step", **numbers} to log.jsonl and each number to TensorBoard as kind/name.

        `step` counts finished optimizer steps. NaN and infinity are written as null.
        """
        if not self.main or (kind, step) in self._known:
            return
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self._lines.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._lines.flush()
        for name, number in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", number, step)
        if self._wandb is not None:
            # wandb's own step may not decrease, but a resumed run repeats some steps.
            self._wandb.log({"step": step, **{f"{kind}/{name}": number for name, number in numbers.items()}})

    def figure(self, tag: str, image: str | Path | np.ndarray, step: int) -> None:
        """Shows an image file, or an array [H, W, 3] uint8, in TensorBoard."""
        if self.main:
            tag = printable(tag)
            array = image if isinstance(image, np.ndarray) else np.asarray(Image.open(image).convert("RGB"))
            self._board.add_image(tag, array, step, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({"step": step, tag: wandb.Image(array)})

    def progress(self, images: int, description: str, done: int = 0) -> tqdm:
        """A progress bar over `images`, `done` of them finished, on terminals and in notebooks.

        Advance it with .update(batch_size) and .set_postfix_str(..., refresh=False).
        """
        return progress_bar(
            total=images,
            initial=done,
            desc=description,
            unit="img",
            dynamic_ncols=True,
            leave=False,
            hidden=not self.main,
        )

    def flush(self) -> None:
        """Writes TensorBoard's events to the file, as every checkpoint requires: a resumed run does not repeat them."""
        if self.main:
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes every file."""
        self._closing.close()


class _LogFile(logging.FileHandler):
    """A log file; an error of writing ends the run, where logging would print a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def _start_wandb(project: str, output: Path, resume: bool, config: dict[str, Any] | None) -> Any:
    """Starts a run of Weights & Biases, or resumes the one whose id is in output/wandb_id."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"train.wandb_project is {project!r}, which needs another package: pip install wandb"
        ) from error
    output.mkdir(parents=True, exist_ok=True)
    place = output / "wandb_id"
    name = place.read_text(encoding="utf-8") if resume and place.is_file() else secrets.token_hex(8)
    place.write_text(name, encoding="utf-8")
    try:
        run = wandb.init(
            project=project, name=output.name, id=name, resume="allow", dir=str(output), config=config
        )  # fmt: skip
        run.define_metric("*", step_metric="step")
    except wandb.errors.Error as error:
        raise ConfigError(f"train.wandb_project is {project!r}: {' '.join(str(error).split())}") from error
    return run


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: of tensors on a GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _keep_until(path: Path, step: int | None) -> set[tuple[str, int]]:
    """Removes the lines of log.jsonl after `step` (None: all lines); returns the (kind, step) of the others."""
    entries = () if step is None else read_jsonl(path)
    kept = {(entry["kind"], entry["step"]): json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step}
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept.values()), encoding="utf-8")
    return set(kept)
