"""A step that is split among processes or batches trains as a whole one; a run may go on with another split."""

import json

import pytest
import torch
from processes import run_processes
from torch import nn

from dat.classification.config import ClassificationConfig
from dat.classification.data import MixPairs
from dat.classification.train import train
from dat.engine import distributed
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import from_dict, load_config
from dat.utils.errors import ConfigError

# no dropout, which is drawn by each process; all else that is random is on
PLAIN = {"epochs": 5, "checkpoint_steps": 0, "pictures": 0}


def run(path, *overrides):
    # Adam makes whole steps of gradients that are rounding alone
    options = ["model.backbone.drop_path_rate=0", "train.optimizer=sgd", "train.lr=0.05"]
    train(load_config(ClassificationConfig, path, [*options, *overrides]))


def run_sharded(path, *overrides):
    # the blocks of the tiny model too
    distributed.SHARD_PARAMETERS = 1000
    run(path, "train.fsdp=true", *overrides)


def outcome(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    metrics = [
        {key: line[key] for key in ("top1", "top5", "images", "loss")} for line in lines if line["kind"] == "val"
    ]
    return load_checkpoint(output / "last.pth"), losses, metrics


def assert_close(first, second, steps):
    (a, losses, metrics), (b, other_losses, other_metrics) = outcome(first), outcome(second)
    assert a["step"] == b["step"] == len(losses) == steps
    for part in ("state_dict", "state_dict_ema"):
        for name, tensor in a[part].items():
            torch.testing.assert_close(
                b[part][name], tensor, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert other_losses == pytest.approx(losses, rel=1e-4)
    for here, there in zip(metrics, other_metrics, strict=True):
        assert there == pytest.approx(here, rel=1e-4)


def run_job(processes, function, folder, config, output, *overrides):
    codes, errors, _ = run_processes(processes, function, folder, config, f"output={output}", *overrides)
    assert codes == [0] * processes, errors


@pytest.fixture
def config(settings, pictures, write_config):
    """20 steps, of 4 pictures each. A broken picture is met by one of the processes alone."""
    settings["train"] |= {**PLAIN, "batch_size": 4}
    for path in (pictures / "train/blue").glob("[4-7].png"):
        path.unlink()
    (pictures / "train/green/7.png").write_bytes(b"")
    return write_config(settings)


@pytest.fixture
def whole(config, tmp_path):
    run(config, f"output={tmp_path / 'whole'}")
    return tmp_path / "whole"


def test_the_split_of_a_step_changes_nothing(config, whole, tmp_path):
    assert (whole / "skipped.txt").read_text() == "green/7.png\n"
    for processes, accumulate in ((1, 2), (2, 1)):
        output = tmp_path / f"split_{processes}"
        run_job(processes, run, tmp_path, config, output, "train.batch_size=2", f"train.accumulate={accumulate}")
        assert_close(whole, output, 25)
        assert (output / "skipped.txt").read_text() == "green/7.png\n"


def test_a_run_goes_on_with_another_split_and_shared_weights(config, tmp_path):
    output = tmp_path / "mixed"
    stages = [
        (1, run, "train.epochs=1", "train.accumulate=1"),
        (2, run, "train.epochs=2", "train.batch_size=2"),
        (2, run_sharded, "train.epochs=4", "train.batch_size=2"),
        (1, run, "train.accumulate=2", "train.batch_size=2"),
    ]
    for processes, function, *overrides in stages:
        run_job(processes, function, tmp_path, config, output, "train.resume=true", "train.min_lr_scale=1", *overrides)
    run(config, f"output={tmp_path / 'constant'}", "train.min_lr_scale=1")
    assert_close(tmp_path / "constant", output, 25)


def test_other_layouts_and_ways_to_compute_change_nothing(config, whole, tmp_path, monkeypatch):
    compiled = []

    def compile_eagerly(self, *arguments, **named):
        # what is captured does not depend on the back end; this one costs no compilation
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    for name in ("channels_last", "grad_checkpointing", "compile"):
        run(config, f"output={tmp_path / name}", f"train.{name}=true")
        assert_close(whole, tmp_path / name, 25)
    assert len(compiled) == 1


def test_what_is_not_possible_is_named(settings):
    settings["train"]["fsdp"] = True
    with pytest.raises(ConfigError, match=r"train.fsdp is true, but there is only one process"):
        train(from_dict(ClassificationConfig, settings, "test"))
    settings["train"].update(fsdp=False, grad_checkpointing=True)
    settings["model"]["backbone"] = {"name": "dla46_c"}
    with pytest.raises(ConfigError, match=r"train.grad_checkpointing=true is not supported by DLA; set it to false"):
        train(from_dict(ClassificationConfig, settings, "test"))


def test_pairs_are_mixed_alike_in_any_batch():
    mix = MixPairs(ClassificationConfig().train, 4, seed=0)
    samples = [(torch.rand(3, 8, 8), i % 4, i, i, 1) for i in range(8)]
    images, targets, index, *_ = mix(samples)
    assert images.shape == (8, 3, 8, 8)
    assert targets.shape == (8, 4)
    assert index.tolist() == list(range(8))
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    for first in (0, 2, 4):
        part = mix(samples[first : first + 4])
        torch.testing.assert_close(part[0], images[first : first + 4], rtol=0, atol=0)
        torch.testing.assert_close(part[1], targets[first : first + 4], rtol=0, atol=0)
    again = mix([(*sample[:4], 2) for sample in samples])
    assert not torch.equal(again[0], images)
