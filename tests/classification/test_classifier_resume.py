"""A run that was stopped, at any moment and in any way, ends as if nothing had happened."""

import pytest
import torch
from kills import assert_same_run, numbers, train_killed

from dat.classification import trainer as task
from dat.classification.config import ClassificationConfig
from dat.classification.train import train
from dat.engine import trainer
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import from_dict
from dat.engine.trainer import Trainer


def run(settings, output, **changes):
    settings = {**settings, "output": str(output), "train": {**settings["train"], **changes}}
    return train(from_dict(ClassificationConfig, settings, "test"))


class Killed(BaseException):
    pass


MOMENTS = (
    "first step",
    "within an epoch",
    "while it evaluates",
    "before the best is saved",
    "before the last is saved",
)


def test_stopped_at_any_step(settings, tmp_path, monkeypatch):
    run(settings, tmp_path / "whole")
    for moment in MOMENTS:
        output = tmp_path / moment.replace(" ", "_")
        with monkeypatch.context() as patched:
            stop_at(moment, patched)
            with pytest.raises(Killed):
                run(settings, output)
        if moment == "while it evaluates":
            assert load_checkpoint(output / "last.pth")["step"] == 8
        run(settings, output, resume=True)
        assert_same_run(tmp_path / "whole", output)


def stop_at(moment, monkeypatch):
    """Raises Killed at a moment of the next run."""
    steps = []
    step, save, measure = Trainer.train_step, trainer.save_checkpoint, task.evaluate

    def train_step(*arguments):
        steps.append(None)
        if len(steps) == {"first step": 1, "within an epoch": 8}.get(moment):
            raise Killed
        return step(*arguments)

    def save_checkpoint(path, state, keep=None):
        # the first epoch is always the best so far
        if moment == f"before the {path.stem} is saved" and len(steps) >= {"best": 4, "last": 8}[path.stem]:
            raise Killed
        save(path, state, keep)

    def evaluate(*arguments):
        if moment == "while it evaluates" and len(steps) == 8:
            raise Killed
        return measure(*arguments)

    monkeypatch.setattr(task, "evaluate", evaluate)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)


def test_killed_at_random_moments(settings, tmp_path, write_config):
    settings["train"] |= {"epochs": 12, "workers": 1}
    killed = train_killed("classification", write_config(settings), tmp_path / "run", kills=2, seed=0, spread=0.2)
    assert [name for name, _ in killed] == ["SIGKILL", "SIGTERM"]
    run(settings, tmp_path / "whole", workers=0)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(settings, tmp_path):
    run(settings, tmp_path / "run", epochs=1)
    before = load_checkpoint(tmp_path / "run/last.pth")
    assert run(settings, tmp_path / "run", epochs=1, resume=True)["steps"] == 4
    after = load_checkpoint(tmp_path / "run/last.pth")
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())
    assert run(settings, tmp_path / "run", epochs=2, resume=True)["epochs"] == 2


def test_a_resumed_run_follows_the_rate_of_its_configuration(settings, tmp_path):
    run(settings, tmp_path / "run", epochs=1, warmup_epochs=0)
    run(settings, tmp_path / "run", epochs=2, warmup_epochs=0, lr=1e-4, min_lr_scale=1, resume=True)
    rates = [line["lr"] for line in numbers(tmp_path / "run") if line["kind"] == "train"]
    assert rates[0] == 2e-3
    assert rates[4:] == pytest.approx([1e-4] * 4)


def test_the_number_of_workers_changes_nothing(settings, tmp_path):
    for workers in (0, 2):
        run(settings, tmp_path / str(workers), epochs=2, workers=workers)
    assert_same_run(tmp_path / "0", tmp_path / "2")
