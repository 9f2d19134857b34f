"""Records of a run: console and train.log, log.jsonl, TensorBoard and a progress bar."""

import json
import logging
import math
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class RunLogger:
    """Writes what a run reports; on every process but the main one it reports nothing.

    Args:
        output: folder of the run, made when missing.
        main: whether this process is the one that writes.
        resume_step: step that the run goes on from; what log.jsonl and TensorBoard hold past it is dropped, and lines
            of this step that are there already are not written again. None starts new files.
    """

    def __init__(self, output: str | Path, main: bool = True, resume_step: int | None = None) -> None:
        self.output, self.main = Path(output), main
        self._logger = logging.getLogger("dat.run")
        self._closing = ExitStack()
        self._known: set[tuple[str, int]] = set()
        if not main:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        self._attach(logging.StreamHandler())
        self._attach(logging.FileHandler(self.output / "train.log", mode="w" if resume_step is None else "a"))
        self._closing.enter_context(logging_redirect_tqdm())
        lines = self.output / "log.jsonl"
        self._known = _keep_until(lines, resume_step)
        self._lines = self._closing.enter_context(lines.open("a", encoding="utf-8"))
        # from step 1 on also in a new run: one that ended before its first checkpoint may have left events
        self._board = SummaryWriter(str(self.output / "tensorboard"), purge_step=(resume_step or 0) + 1)
        self._closing.callback(self._board.close)

    def _attach(self, handler: logging.Handler) -> None:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        # on the root: warnings of timm and torch belong in train.log too; only this logger shows less than warnings
        logging.getLogger().addHandler(handler)
        self._logger.setLevel(logging.INFO)
        self._closing.callback(handler.close)
        self._closing.callback(logging.getLogger().removeHandler, handler)

    def info(self, message: str) -> None:
        """One line on the console and in train.log."""
        if self.main:
            self._logger.info(message)

    def warning(self, message: str) -> None:
        """One line, marked as a warning, on the console and in train.log."""
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

    def figure(self, tag: str, picture: str | Path | np.ndarray, step: int) -> None:
        """Shows an image file, or an array [H, W, 3] uint8, in TensorBoard."""
        if self.main:
            array = picture if isinstance(picture, np.ndarray) else np.asarray(Image.open(picture).convert("RGB"))
            self._board.add_image(tag, array, step, dataformats="HWC")

    def progress(self, images: int, description: str, done: int = 0) -> tqdm:
        """A bar over `images`, `done` of them finished: shows images/s and the time left.

        Advance it with .update(batch_size) and .set_postfix(loss=..., lr=..., refresh=False). Shown on terminals only.
        """
        # disable=None: shown only where stderr is a terminal
        return tqdm(
            total=images, initial=done, desc=description, unit="img", dynamic_ncols=True, leave=False,
            disable=None if self.main else True,
        )  # fmt: skip

    def flush(self) -> None:
        """Brings TensorBoard's events to the file: before a checkpoint, which a resumed run will not go behind."""
        if self.main:
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes every file."""
        self._closing.close()


def _keep_until(path: Path, step: int | None) -> set[tuple[str, int]]:
    """Drops the lines of a JSON-lines file past `step`, all when it is None; returns the (kind, step) of the others."""
    kept: dict[tuple[str, int], str] = {}
    if step is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            # a killed run may leave half a line behind
            except json.JSONDecodeError:
                continue
            if entry["step"] <= step:
                kept[entry["kind"], entry["step"]] = line + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept.values()), encoding="utf-8")
    os.replace(temporary, path)
    return set(kept)
