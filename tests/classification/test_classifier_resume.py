"""A run that was stopped, at any moment and in any way, ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from classification import train as training
from classification.config import ClassificationConfig
from classification.train import train
from dat.training.checkpoint import load_checkpoint
from dat.training.config import from_dict

ROOT = Path(__file__).parents[2]


def run(settings, output, **changes):
    settings = {**settings, "output": str(output), "train": {**settings["train"], **changes}}
    return train(from_dict(ClassificationConfig, settings, "test"))


def assert_same_run(first, second):
    """Same weights, averaged weights, optimizer state, best metric, log and configuration but for the folder."""
    a, b = load_checkpoint(first / "last.pth"), load_checkpoint(second / "last.pth")
    for part in ("state_dict", "state_dict_ema"):
        assert a[part].keys() == b[part].keys()
        for name, tensor in a[part].items():
            assert torch.equal(tensor, b[part][name]), name
    for key, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name])
    for key in ("step", "epoch", "step_in_epoch", "best"):
        assert a[key] == b[key]
    assert numbers(first) == numbers(second)


def numbers(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "moment",
    ["first step", "within an epoch", "while it evaluates", "before the best is saved", "before the last is saved"],
)
def test_stopped_at_any_step(settings, tmp_path, monkeypatch, moment):
    run(settings, tmp_path / "whole")

    steps = []
    step, save, measure = training.train_step, training.save_checkpoint, training.evaluate

    def train_step(*arguments):
        steps.append(None)
        if len(steps) == {"first step": 1, "within an epoch": 8}.get(moment):
            raise Killed
        return step(*arguments)

    def save_checkpoint(path, state):
        # the first epoch is always the best so far
        if moment == f"before the {path.stem} is saved" and len(steps) >= {"best": 4, "last": 8}[path.stem]:
            raise Killed
        save(path, state)

    def evaluate(*arguments):
        if moment == "while it evaluates" and len(steps) == 8:
            raise Killed
        return measure(*arguments)

    monkeypatch.setattr(training, "evaluate", evaluate)
    monkeypatch.setattr(training, "train_step", train_step)
    monkeypatch.setattr(training, "save_checkpoint", save_checkpoint)
    with pytest.raises(Killed):
        run(settings, tmp_path / "stopped")
    monkeypatch.undo()
    if moment == "while it evaluates":
        assert load_checkpoint(tmp_path / "stopped/last.pth")["step"] == 8
    run(settings, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def spawn(config, *overrides, group=False):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "classification.train", str(config), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=group
    )


def wait_for_step(output, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "log.jsonl").exists() and f'"step": {step},' in (output / "log.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.stderr.read()}")


def test_kill_9_then_sigterm_then_resume(settings, tmp_path, write_config):
    settings["train"]["epochs"] = 12
    settings["train"]["workers"] = 1
    output = tmp_path / "run"
    config = write_config(settings)
    with spawn(config) as process:
        wait_for_step(output, 10, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert load_checkpoint(output / "last.pth")["step"] < 48
    with spawn(config, "train.resume=true", group=True) as process:
        wait_for_step(output, 20, process)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
        assert process.stderr.read().strip().splitlines()[-1] == "stopped by SIGTERM; go on with train.resume=true"
    assert load_checkpoint(output / "last.pth")["step"] < 48
    run(settings, output, resume=True)
    run(settings, tmp_path / "whole", workers=0)
    assert_same_run(tmp_path / "whole", output)


def test_resuming_a_finished_run_changes_nothing(settings, tmp_path):
    run(settings, tmp_path / "run", epochs=1)
    before = load_checkpoint(tmp_path / "run/last.pth")
    assert run(settings, tmp_path / "run", epochs=1, resume=True)["step"] == 4
    after = load_checkpoint(tmp_path / "run/last.pth")
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())
    assert run(settings, tmp_path / "run", epochs=2, resume=True)["epoch"] == 2


def test_a_resumed_run_follows_the_rate_of_its_configuration(settings, tmp_path):
    run(settings, tmp_path / "run", epochs=1, warmup_epochs=0)
    run(settings, tmp_path / "run", epochs=2, warmup_epochs=0, lr=1e-4, min_lr=1e-4, resume=True)
    rates = [line["lr"] for line in numbers(tmp_path / "run") if line["kind"] == "train"]
    assert rates[0] == 2e-3
    assert rates[4:] == pytest.approx([1e-4] * 4)


def test_the_number_of_workers_changes_nothing(settings, tmp_path):
    for workers in (0, 2):
        run(settings, tmp_path / str(workers), epochs=2, workers=workers)
    assert_same_run(tmp_path / "0", tmp_path / "2")
