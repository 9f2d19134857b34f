"""The trainer, on a task that takes milliseconds: late reading of values, resuming, what is saved and logged."""

import copy
import functools
import json
import operator
import os
import re
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.utils.data import DataLoader

from dat.engine import optim
from dat.engine.checkpoint import OPTIONAL, load_checkpoint, read_trained
from dat.engine.command import main_guard
from dat.engine.distributed import Distributed, prepare_output, setup_distributed
from dat.engine.loaders import EpochBatchSampler
from dat.engine.task import first_few
from dat.engine.train_config import TrainConfig, check_train_config
from dat.engine.trainer import Trainer
from dat.utils.errors import CheckpointError, ConfigError, NonFiniteError


@dataclass
class Model:
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "toy"})


@dataclass
class Config:
    output: str = "runs/toy"
    seed: int = 0
    model: Model = field(default_factory=Model)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=2, lr=0.1, log_steps=1, device="cpu"))


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, item):
        _, index = item
        return torch.tensor([index / 12, 1.0]), torch.tensor([index / 6]), index


class ToyTrainer(Trainer):
    """Fits a line; an epoch has three steps."""

    kind = "toy"
    metric = "score"
    results_file = "results.json"
    losses = ("loss_abs",)

    def build_loaders(self):
        sampler = EpochBatchSampler(12, self.config.train.batch_size, 0, accumulate=self.config.train.accumulate)
        loader = DataLoader(Points(), batch_sampler=sampler)
        return sampler, loader, loader

    def build_model(self, weights=True):
        return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def inputs(self, batch):
        return (self.to_device(batch[0]),)

    def compute_loss(self, batch, outputs, normalizers):
        difference = outputs - batch[1]
        loss = difference.square().mean() / normalizers
        return {"loss": loss, "loss_abs": difference.abs().mean() / normalizers}

    def evaluate(self):
        weight = self.evaluation_model()[0].weight
        return {"score": self.progress.step + weight.sum().item() * 1e-6, "nothing": None, "per_class": {}}

    def save_results(self, path):
        path.write_text("[]")

    def load_metrics(self, path):
        return {"score": self.progress.best}

    def write_report(self, metrics, text):
        return []

    def format_metrics(self, metrics):
        return str(metrics)

    def class_state(self):
        return {"class_names": ["line"]}

    def describe_data(self):
        return "12 points"

    def describe_batch(self, batch):
        return f"points {batch[2].tolist()}"


ALONE = Distributed(0, 1, torch.device("cpu"))


def make(folder, resume=False, trainer=ToyTrainer, **train):
    config = Config(output=str(folder))
    for name, value in train.items():
        setattr(config.train, name, value)
    check_train_config(config)
    return trainer(config, ALONE, folder / "last.pth" if resume else None)


def lines(folder, kind="train"):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


@pytest.fixture
def late(monkeypatch):
    """Values are read during the next step, as on a GPU."""
    monkeypatch.setattr(optim, "can_skip_on_device", lambda optimizer, device: True)


def assert_same(first, second, parts=("state_dict", "state_dict_ema")):
    for part in parts:
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_that_are_read_late_change_nothing(tmp_path, monkeypatch, accumulate):
    options = {"ema_decay": 0.9, "clip_grad": 0.1, "accumulate": accumulate, "batch_size": 2}
    make(tmp_path / "now", **options).run()
    monkeypatch.setattr(optim, "can_skip_on_device", lambda optimizer, device: True)
    make(tmp_path / "late", **options).run()
    assert_same(load_checkpoint(tmp_path / "now/last.pth"), load_checkpoint(tmp_path / "late/last.pth"))
    measured = ("images_per_second", "eta_seconds", "memory_gib")
    for a, b in zip(lines(tmp_path / "now"), lines(tmp_path / "late"), strict=True):
        assert {k: v for k, v in a.items() if k not in measured} == {k: v for k, v in b.items() if k not in measured}


class Broken(ToyTrainer):
    """In its fifth step, `what` is not finite."""

    what = "loss"

    def compute_loss(self, batch, outputs, normalizers):
        losses = super().compute_loss(batch, outputs, normalizers)
        if self.progress.step == 4 or (self.progress.step > 4 and batch[2].tolist() == self.bad):
            self.bad = batch[2].tolist()
            factor = {"loss": float("inf"), "gradient": 1.0}[self.what]
            losses["loss"] = losses["loss"] * factor + NoGradient.apply(outputs).sum()
        return losses


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


@pytest.mark.parametrize("moment", ["now", "late"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weights(tmp_path, monkeypatch, moment, what):
    if moment == "late":
        monkeypatch.setattr(optim, "can_skip_on_device", lambda optimizer, device: True)
    monkeypatch.setattr(Broken, "what", what)
    make(tmp_path / "good", epochs=0, steps=4, schedule="step").run()
    trainer = make(tmp_path / "bad", trainer=Broken, epochs=0, steps=6, schedule="step")
    with pytest.raises(
        NonFiniteError, match=r"step 5, points \[.*\]: first non-finite tensor is the gradient of 0.wei"
    ):
        trainer.run()
    good = load_checkpoint(tmp_path / "good/last.pth")
    assert_same(good, {"state_dict": trainer.model.state_dict()}, ("state_dict",))
    assert trainer.optimizer.state[trainer.model[0].weight]["step"] == 4
    assert load_checkpoint(tmp_path / "bad/last.pth")["step"] == 3


def test_a_step_that_is_not_finite_is_never_saved(tmp_path, late):
    trainer = make(tmp_path, trainer=Broken, epochs=0, steps=6, checkpoint_steps=1)
    with pytest.raises(NonFiniteError, match="step 5"):
        trainer.run()
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 4


def test_outputs_that_are_not_finite_are_traced_late(tmp_path, late, monkeypatch):
    def inputs(self, batch):
        (x,) = ToyTrainer.inputs(self, batch)
        return (x * float("nan") if 7 in batch[2].tolist() else x,)

    monkeypatch.setattr(Broken, "inputs", inputs)
    monkeypatch.setattr(Broken, "compute_loss", ToyTrainer.compute_loss)
    with pytest.raises(NonFiniteError, match=r"points \[.*7.*\]: first non-finite tensor is the batch of images"):
        make(tmp_path, trainer=Broken).run()


def test_the_means_of_the_log_survive_an_interruption(tmp_path, monkeypatch):
    make(tmp_path / "whole", epochs=3, log_steps=2, checkpoint_steps=1).run()
    step, count = ToyTrainer.train_step, []

    def train_step(self, batches):
        count.append(None)
        if len(count) in (2, 5):
            raise KeyboardInterrupt
        step(self, batches)

    monkeypatch.setattr(ToyTrainer, "train_step", train_step)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "stopped", resume, epochs=3, log_steps=2, checkpoint_steps=1).run()
    make(tmp_path / "stopped", True, epochs=3, log_steps=2, checkpoint_steps=1).run()
    assert_same(*(load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "stopped")), ("state_dict",))
    whole, stopped = (
        [(e["step"], e["loss"], e["grad_norm"]) for e in lines(tmp_path / n)] for n in ("whole", "stopped")
    )
    assert whole == stopped
    assert [step for step, *_ in whole] == [2, 3, 4, 6, 8, 9]


def test_a_resumed_run_says_what_changed(tmp_path):
    make(tmp_path, epochs=1).run()
    make(tmp_path, True, epochs=2, clip_grad=0.5).run()
    log = (tmp_path / "train.log").read_text()
    assert re.search(r"changed since: train.clip_grad was [\d.]+, is now 0.5\n", log)
    assert "changed since: train.epochs was 1, is now 2" in log
    assert "train.resume was" not in log


def test_the_best_checkpoint_holds_the_averaged_weights_alone(tmp_path):
    make(tmp_path, ema_decay=0.9).run()
    best, last = load_checkpoint(tmp_path / "best.pth"), load_checkpoint(tmp_path / "last.pth")
    assert {"optimizer", "state_dict_ema"} & best.keys() == set()
    # The best epoch is the last here.
    assert_same({"w": best["state_dict"]}, {"w": last["state_dict_ema"]}, ("w",))
    assert_same({"w": best["state_dict"]}, {"w": read_trained(tmp_path / "last.pth", "toy").weights}, ("w",))
    (tmp_path / "best.pth").replace(tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=r"last.pth: has no optimizer state, as best.pth has none"):
        make(tmp_path, True, ema_decay=0.9)


def test_a_run_leaves_its_metrics_and_log(tmp_path):
    metrics = make(tmp_path, epochs=4, eval_epochs=2).run()
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["epoch"] == metrics["epochs"] == 4
    assert metrics["steps"] == 12
    assert [line["step"] for line in lines(tmp_path, "val")] == [6, 12]
    assert lines(tmp_path, "val")[0]["nothing"] is None
    assert {"loss", "loss_abs", "grad_norm", "lr", "epoch", "images_per_second", "eta_seconds", "memory_gib"} <= {
        *lines(tmp_path)[0]
    }


@pytest.mark.parametrize(
    ("key", "length"),
    [("epochs", {"epochs": 1}), ("steps", {"epochs": 0, "steps": 2}), ("least_steps", {"epochs": 1, "least_steps": 4})],
)
def test_a_finished_run_names_the_key_that_sets_its_length(tmp_path, key, length):
    trainer = make(tmp_path, **length)
    assert "nothing left" not in trainer._describe()
    trainer.progress.step = trainer.progress.closed = trainer.total_steps
    assert trainer._describe().endswith(f"\nnothing left to train; raise train.{key} to go on")


def test_a_warmup_as_long_as_the_run_is_said(tmp_path):
    """An epoch has three steps."""
    for number, (options, text) in enumerate((
        ({"warmup_epochs": 2}, "train.warmup_epochs is 2, a warm-up of 6 steps in a run of 6: the learning rate only "),
        ({"warmup_steps": 200}, "train.warmup_steps is 200, a warm-up of 200 steps in a run of 6: "),
        ({"warmup_steps": 5}, None),
        ({"warmup_epochs": 1.5}, None),
    )):  # fmt: skip
        warnings = make(tmp_path / str(number), **options).warnings
        assert [warning.startswith(text) for warning in warnings] == [True] * bool(text), options


def test_a_run_ends_when_it_is_good_enough(tmp_path):
    assert make(tmp_path, epochs=9).run(until=5)["steps"] == 6


class Plateau(ToyTrainer):
    """Its score rises at the second evaluation only."""

    def evaluate(self):
        return super().evaluate() | {"score": 0.5 if self.progress.epoch > 1 else 0.25}

    def write_report(self, metrics, text):
        self.text = text
        return []


def test_a_run_stops_when_its_metric_no_longer_rises(tmp_path):
    make(tmp_path / "whole", trainer=Plateau, epochs=9, ema_decay=0.9).run()
    stopping = make(tmp_path / "run", trainer=Plateau, epochs=9, ema_decay=0.9, early_stop=3)
    metrics = stopping.run()
    assert (metrics["epoch"], metrics["epochs"], metrics["steps"]) == (2, 5, 15)
    reason = "stopped early, after epoch 5 of 9: score has not risen above 0.5, of epoch 2, in 3 evaluations"
    assert reason in stopping.text
    assert reason in (tmp_path / "run/train.log").read_text()

    resumed = make(tmp_path / "run", True, Plateau, epochs=9, ema_decay=0.9, early_stop=3)
    assert resumed.run()["steps"] == 15
    assert (tmp_path / "run/train.log").read_text().count(reason) == 2
    going_on = make(tmp_path / "run", True, Plateau, epochs=9, ema_decay=0.9)
    assert going_on.run()["steps"] == 27
    assert "stopped early" not in going_on.text
    assert_same(*(load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "run")))


def test_evaluations_without_a_rise_are_counted_across_an_interruption(tmp_path, monkeypatch):
    step = Plateau.train_step

    def interrupted(self, batches):
        if self.progress.step == 10:
            raise KeyboardInterrupt
        step(self, batches)

    monkeypatch.setattr(Plateau, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, trainer=Plateau, epochs=9, early_stop=3).run()
    monkeypatch.undo()
    assert make(tmp_path, True, Plateau, epochs=9, early_stop=3).run()["epochs"] == 5


def test_checkpoints_of_earlier_versions_are_resumed(tmp_path):
    """Without the classes of a toy, there is one number of seconds, no end of an epoch, and other names of keys."""
    make(tmp_path / "run", epochs=1).run()
    state = torch.load(tmp_path / "run/last.pth", weights_only=True)
    for name in ("closed", "stale", "train_seconds", "eval_seconds", "sums", "summed", "images_per_step", "loss"):
        del state[name]
    for name in ("steps", "warmup_steps", "eval_batch_size", "schedule", "channels_last", "min_lr_scale"):
        del state["config"]["train"][name]
    state["config"]["train"]["min_lr"] = 0.01
    torch.save(state | {"seconds": 5.0}, tmp_path / "run/last.pth")
    trainer = make(tmp_path / "run", True, epochs=2)
    assert (trainer.progress.closed, trainer.progress.seconds) == (3, 5.0)
    assert trainer.run()["epochs"] == 2


def places(content, place=()):
    """The place of each entry of nested dictionaries and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*place, key)
        if isinstance(value, (dict, list)) and key != "config":
            yield from places(value, (*place, key))


def test_an_entry_that_is_missing_or_mistyped_is_named(tmp_path):
    """A run stopped within an epoch; entries without which earlier versions were saved may be missing."""
    make(tmp_path / "whole", checkpoint_steps=2, ema_decay=0.9, log_steps=5).run()
    (tmp_path / "whole/previous.pth").unlink()
    last, path = tmp_path / "whole/last.pth", tmp_path / "run/last.pth"
    path.parent.mkdir()
    state = torch.load(last, weights_only=True)
    state |= {"epoch": 1, "step_in_epoch": 1, "step": 4, "closed": 3, "sums": [1.0, 1.0, 1.0], "summed": 1}
    state["best_epoch"] = 1
    torch.save(state, path)
    make(path.parent, True, ema_decay=0.9, log_steps=5).run()
    # Options of the optimizer are those of the configuration.
    optional = {*OPTIONAL, *(set(state["optimizer"]["param_groups"][0]) - {"params"})}
    # Parameters that never had a gradient have none.
    states = [("optimizer", "state", number) for number in state["optimizer"]["state"]]
    wrong = []
    for place in places(state):
        for change in ("deleted", None, "x", -7.5):
            content = copy.deepcopy(state)
            *outer, key = place
            inner = functools.reduce(operator.getitem, outer, content)
            before = inner[key]
            if change == "deleted":
                del inner[key]
            else:
                inner[key] = change
            torch.save(content, path)
            try:
                make(path.parent, True, ema_decay=0.9, log_steps=5).run()
            except CheckpointError as error:
                if not str(error).startswith(f"{path}: ") or "\n" in str(error):
                    wrong.append((place, change, str(error)))
            else:
                # Another number or no group at all is no mistake of the type.
                another = isinstance(before, float) and change == -7.5
                if key not in optional and not another and not (place in states and change == "deleted"):
                    wrong.append((place, change, "accepted"))
    assert wrong == []


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(tmp_path, capsys, damage):
    options = {"ema_decay": 0.9, "schedule": "step", "warmup_epochs": 0}
    make(tmp_path / "whole", epochs=4, **options).run()
    run = tmp_path / "run"
    make(run, epochs=2, checkpoint_steps=1, **options).run()
    last, previous = run / "last.pth", (run / "previous.pth").read_bytes()
    weight = load_checkpoint(last)["state_dict"]["0.weight"].numpy().tobytes()
    last.write_bytes(last.read_bytes().replace(weight, bytes(len(weight))))
    if damage == "missing":
        last.unlink()
    config = Config(output=str(run))
    config.train.epochs = 4
    for name, value in options.items():
        setattr(config.train, name, value)
    trainer = ToyTrainer(config, ALONE, prepare_output(run, True, ALONE))
    assert (run / "previous.pth").read_bytes() == previous
    trainer.run()
    assert (
        f"{last} is missing or damaged: the run goes on from {run / 'previous.pth'}" in (run / "train.log").read_text()
    )
    assert_same(load_checkpoint(tmp_path / "whole/last.pth"), load_checkpoint(last))
    assert load_checkpoint(run / "previous.pth")["step"] == 12


def test_a_device_that_computes_in_float32_takes_no_bfloat16(tmp_path):
    config = Config(output=str(tmp_path))
    config.train.amp = "bf16"
    with pytest.raises(ConfigError, match=r"train.amp is bf16, should be none on mps"):
        ToyTrainer(config, Distributed(0, 1, torch.device("mps")))


@pytest.mark.parametrize(("key", "value"), [("epochs", 0), ("workers", -1), ("lr", 0.0), ("eval_batch_size", 0)])
def test_values_that_cannot_work_are_named(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"train.{key} is {value}, should be"):
        make(tmp_path, **{key: value})


def test_messages_list_a_few_images():
    assert first_few(["a", "b"]) == "['a', 'b']"
    assert first_few(range(100)) == "[0, 1, 2, 3, 4, 5, 6, 7, ... 100 in all]"


class BrokenOnOne(ToyTrainer):
    """The images of the second process are not finite in its third step."""

    bad: Any = None

    def inputs(self, batch):
        (x,) = super().inputs(batch)
        if self.distributed.rank == 1 and self.progress.step == 2:
            self.bad = batch
        return (x * float("nan") if batch is self.bad else x,)


def run_broken(folder, moment):
    if moment == "late":
        optim.can_skip_on_device = lambda optimizer, device: True
    config = Config(output=str(folder))
    config.train.epochs = 2

    def main():
        BrokenOnOne(config, setup_distributed("cpu")).run()

    main_guard(main)


@pytest.mark.parametrize("moment", ["now", "late"])
def test_what_is_not_finite_in_one_process_ends_all(tmp_path, moment):
    codes, errors, _ = run_processes(2, run_broken, tmp_path, tmp_path / "run", moment)
    assert codes == [1, 1]
    assert "error: step 3, points [" in errors[1]
    assert "]: first non-finite tensor is the batch of images (4, 2): 8 NaN" in errors[1]
    assert "error: step 3, points [" in errors[0]
    assert "the batch of images" not in errors[0]
    assert not (tmp_path / "run/last.pth").exists()


class StoppedOnOne(ToyTrainer):
    def compute_loss(self, batch, outputs, normalizers):
        if self.distributed.rank == 1 and self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().compute_loss(batch, outputs, normalizers)


def run_stopped(folder, moment):
    if moment == "late":
        optim.can_skip_on_device = lambda optimizer, device: True
    config = Config(output=str(folder))
    config.train.log_steps = 20
    main_guard(lambda: StoppedOnOne(config, setup_distributed("cpu")).run())


@pytest.mark.parametrize(("moment", "step"), [("now", 2), ("late", 3)])
def test_sigterm_to_one_process_stops_all_after_a_checkpoint(tmp_path, moment, step):
    codes, errors, _ = run_processes(2, run_stopped, tmp_path, tmp_path / "run", moment)
    assert codes == [143, 143], errors
    assert load_checkpoint(tmp_path / "run/last.pth")["step"] == step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_does_not_wait_for_it(tmp_path):
    config = Config(output=str(tmp_path))
    config.train.ema_decay, config.train.clip_grad = 0.9, 0.1
    trainer = ToyTrainer(config, Distributed(0, 1, torch.device("cuda", 0)))
    batches = [next(iter(trainer.loader))]
    # The first step initialises the optimizer's state.
    trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer._read_pending()
    assert trainer.progress.summed == 4
