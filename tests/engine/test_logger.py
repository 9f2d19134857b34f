"""Records of a run: what is written, by whom, and what a resumed run keeps."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dat.engine.logger import RunLogger
from dat.utils.errors import ConfigError


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_numbers_lines_and_pictures_are_written(tmp_path):
    handlers = list(logging.getLogger().handlers)
    logger = RunLogger(tmp_path)
    logger.info("hello")
    logger.log("train", 3, loss=0.5, lr=float("nan"))
    logger.figure("curve", np.zeros((4, 5, 3), np.uint8), 3)
    with logger.progress(10, "epoch 1") as bar:
        bar.update(4)
    logger.close()
    assert read(tmp_path) == [{"kind": "train", "step": 3, "loss": 0.5, "lr": None}]
    assert "hello" in (tmp_path / "train.log").read_text()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(("resume_step", "kept"), [(None, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_drops_what_it_will_do_again(tmp_path, resume_step, kept):
    logger = RunLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log("train", step, loss=1.0)
    logger.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    logger = RunLogger(tmp_path, resume_step=resume_step)
    logger.log("train", 10, loss=1.0)
    logger.close()
    assert [line["step"] for line in read(tmp_path)] == [*kept, 10]


def test_a_line_of_the_step_resumed_from_is_neither_lost_nor_doubled(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log("train", 2, loss=1.0)
    logger.log("val", 2, top1=50.0)
    logger.close()
    logger = RunLogger(tmp_path, resume_step=2)
    logger.log("val", 2, top1=50.0)
    logger.log("val", 4, top1=60.0)
    logger.close()
    assert [(line["kind"], line["step"]) for line in read(tmp_path)] == [("train", 2), ("val", 2), ("val", 4)]


def scalars(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_tensorboard_is_flushed_and_purged(tmp_path):
    logger = RunLogger(tmp_path)
    for step in (1, 2):
        logger.log("train", step, loss=1.0)
    logger.flush()
    assert scalars(tmp_path) == [1, 2]
    logger.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    # the reader goes by name, in which two files of the same second may be in any order
    events.rename(events.with_name("events.out.tfevents.0"))
    # a new run after one that left no checkpoint
    logger = RunLogger(tmp_path)
    logger.log("train", 1, loss=1.0)
    logger.close()
    assert scalars(tmp_path) == [1]


def test_other_processes_write_nothing(tmp_path):
    logger = RunLogger(tmp_path / "run", main=False)
    logger.info("hello")
    logger.log("train", 1, loss=1.0)
    logger.figure("x", np.zeros((4, 5, 3), np.uint8), 1)
    logger.close()
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_are_told_and_gone_on_with(tmp_path, monkeypatch):
    """A stand-in for the package, which needs an account."""
    started, told, metrics, ended = [], [], [], []

    def init(**options):
        started.append(options)
        run = {
            "log": told.append,
            "finish": lambda: ended.append(None),
            "define_metric": lambda *a, **k: metrics.append(a),
        }
        return SimpleNamespace(**run)

    package = SimpleNamespace(init=init, Image=lambda array: array.shape, errors=SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", package)
    for resume_step in (None, 2, None):
        logger = RunLogger(tmp_path, resume_step=resume_step, wandb_project="flowers", config={"seed": 1})
        logger.log("train", 3, loss=0.5)
        logger.figure("curve", np.zeros((4, 5, 3), np.uint8), 3)
        logger.close()
    assert told[:2] == [{"step": 3, "train/loss": 0.5}, {"step": 3, "curve": (4, 5, 3)}]
    assert len(ended) == 3
    first, resumed, new = started
    assert first == resumed
    assert first["id"] != new["id"]
    assert (first["project"], first["name"], first["config"]) == ("flowers", tmp_path.name, {"seed": 1})


def test_weights_and_biases_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train.wandb_project is 'flowers', which .*: pip install wandb"):
        RunLogger(tmp_path / "run", wandb_project="flowers")
    assert not (tmp_path / "run").exists()


def test_the_progress_bar_shows_in_notebooks(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path)
    # The notebook's tests import it in this process.
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert logger.progress(10, "epoch 1").disable
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    bar = logger.progress(10, "epoch 1")
    assert not bar.disable
    bar.close()
    assert RunLogger(tmp_path, main=False).progress(10, "epoch 1").disable
    logger.close()
