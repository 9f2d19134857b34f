"""Checkpoints: atomic, exact, and clear about what is wrong with a file."""

import re
import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from dat.engine import checkpoint, optim
from dat.engine.checkpoint import (
    LAST,
    PREVIOUS,
    check_resumable,
    check_training_state,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from dat.engine.config import to_dict
from dat.engine.optimizer_state import load_optimizer
from dat.utils.errors import CheckpointError


def test_what_is_saved_is_loaded(tmp_path):
    state = {"kind": "detection", "config": {"a": [1, None]}, "state_dict": {"w": torch.arange(3.0)}, "best": 0.5}
    save_checkpoint(tmp_path / "last.pth", state)
    loaded = load_checkpoint(tmp_path / "last.pth", kind="detection")
    assert loaded["config"] == state["config"]
    assert loaded["best"] == 0.5
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing\nmore")])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})

    def half(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match=r"last.pth: cannot write the checkpoint: .*previous checkpoint is kept"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]


def test_a_kill_while_writing_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path)["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"state_dict": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"last.pth: not a checkpoint, or a truncated one"):
            load_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(CheckpointError, match=r"x.pth: no such checkpoint file"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="format is None"):
        load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="format is 'list'"):
        load_checkpoint(path)
    save_checkpoint(path, {"kind": "detection"})
    with pytest.raises(CheckpointError, match="is a detection checkpoint, should be a classification checkpoint"):
        load_checkpoint(path, kind="classification")


def test_pickled_objects_are_never_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"format": 1, "x": Attack()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "owned").exists()


def test_another_architecture_is_named_by_its_first_difference():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    good = model.state_dict()
    load_weights(model, good, "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: of another architecture: it lacks 1.bias \(1,\)"):
        load_weights(model, {name: value for name, value in good.items() if name != "1.bias"}, "x.pth")
    with pytest.raises(CheckpointError, match=r"0.weight is \(4, 2\), should be \(3, 2\)"):
        load_weights(model, {**good, "0.weight": torch.zeros(4, 2)}, "x.pth")
    with pytest.raises(CheckpointError, match=r"the model has no 2.weight"):
        load_weights(model, {**good, "2.weight": torch.zeros(1)}, "x.pth")


@pytest.mark.parametrize("error", [IndexError, struct.error, AttributeError, TypeError, AssertionError])
def test_damage_is_one_line_whatever_torch_makes_of_it(tmp_path, monkeypatch, error):
    def load(*arguments, **options):
        raise error

    (tmp_path / "x.pth").touch()
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="not a checkpoint, or a truncated one"):
        load_checkpoint(tmp_path / "x.pth")


def test_optimizer_state_that_is_missing_or_unfit_is_named():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    load_optimizer(optimizer, {"optimizer": optimizer.state_dict()}, "last.pth")
    with pytest.raises(CheckpointError, match=r"last.pth: has no optimizer state, as best.pth has none"):
        load_optimizer(optimizer, {}, "last.pth")
    other = torch.optim.AdamW([{"params": [parameter]} for parameter in model.parameters()])
    with pytest.raises(CheckpointError, match=r"last.pth: its optimizer state does not fit .* parameter groups"):
        load_optimizer(optimizer, {"optimizer": other.state_dict()}, "last.pth")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("step", torch.tensor([1.0, 2.0]), "a tensor (2,), should be one number"),
        ("step", torch.tensor(-1.0), "a tensor () that holds -1, should be 0 or more"),
        ("exp_avg", torch.zeros(2, 2).to_sparse(), "of torch.sparse_coo and torch.float32, should be dense and real"),
        ("exp_avg", torch.zeros(2, 2, dtype=torch.complex64), "and torch.complex64, should be dense and real"),
        ("exp_avg_sq", torch.full((2, 2), -1.0), "a tensor (2, 2) that holds -1, should be 0 or more"),
        ("exp_avg_sq", torch.full((2, 2), float("nan")), "a tensor (2, 2) that holds NaN or infinity"),
        ("exp_avg", torch.zeros(2, 2, device="meta"), "on meta of torch.strided and torch.float32, should be"),
        ("exp_avg", torch.zeros(2, 2).to(torch.float8_e4m3fn), "and torch.float8_e4m3fn, should be dense and real"),
        ("exp_avg", 0.5, "0.5, should be a tensor"),
        ("exp_avg_sq", None, "None, should be a tensor"),
        ("exp_avg_sq_row", torch.tensor([-1.0]), "a tensor (1,) that holds -1, should be 0 or more"),
        ("use_muon", "x", "'x', should be a finite number"),
    ],
)
def test_tensors_that_no_optimizer_leaves_are_named(name, tensor, message):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for values in saved["state"].values():
        values.setdefault(name, values["exp_avg"] if isinstance(tensor, torch.Tensor) else True)
    saved["state"][0][name] = tensor
    wanted = f"last.pth: its optimizer state is unsound: {name} of parameter 0 is .*{re.escape(message)}"
    with pytest.raises(CheckpointError, match=wanted):
        load_optimizer(optimizer, {"optimizer": saved}, "last.pth")


def test_steps_of_a_group_are_never_negative():
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["step"] = -1
    with pytest.raises(CheckpointError, match="step of group 0 is -1, should be a number of at least 0"):
        load_optimizer(optimizer, {"optimizer": saved}, "last.pth")


def test_options_are_those_of_the_configuration():
    parameters = [*nn.Linear(2, 2).parameters()]
    saved = torch.optim.AdamW(parameters, lr=1.0, maximize=True, betas=(0.5, 0.6)).state_dict()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    load_optimizer(optimizer, {"optimizer": saved}, "last.pth")
    (group,) = optimizer.param_groups
    assert (group["lr"], group["maximize"], group["betas"]) == (0.1, False, (0.9, 0.999))


def one_step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    optimizer.step()


# Lamb, Adan and Lookahead count the steps of a group, Muon and Adafactor treat matrices in another way, NovoGrad has
# one second moment of all numbers of a parameter.
@pytest.mark.parametrize(
    "name",
    ["adamw", "sgd", "rmsprop", "lamb", "adan", "lookahead_adamw", "muon", "adafactor", "adafactorbv", "novograd"],
)
def test_every_kind_of_optimizer_goes_on(tmp_path, name):
    models = [nn.Sequential(nn.Linear(2, 40), nn.Linear(130, 140)) for _ in range(2)]
    whole, resumed = (optim.make_optimizer(optim.param_groups(m, 0.1, 0.01), name, 0.1, 0.01) for m in models)
    one_step(whole)
    save_checkpoint(tmp_path / "last.pth", {"optimizer": whole.state_dict()})
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer(resumed, load_checkpoint(tmp_path / "last.pth"), tmp_path / "last.pth")
    one_step(whole)
    one_step(resumed)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema"])
def test_weights_that_are_not_finite_are_named(part):
    state = dict.fromkeys(("step", "epoch", "step_in_epoch", "best", "best_epoch"), 0)
    state |= {"config": {}, "state_dict": {"w": torch.zeros(2)}, "state_dict_ema": {"w": torch.zeros(2)}}
    check_training_state(state, (), 0, "last.pth")
    state[part] = {"w": torch.tensor([1.0, float("nan")])}
    with pytest.raises(CheckpointError, match=rf"last.pth: {part}.w \(2,\) holds NaN or infinity"):
        check_training_state(state, (), 0, "last.pth")


@dataclass
class Config:
    seed: int = 0
    lr: float = 0.1
    model: dict[str, Any] = field(default_factory=lambda: {"name": "a", "drop_rate": 0.1})


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Config(seed=1), "last.pth: seed was 0, is now 1; resuming needs the same"),
        (Config(model={"name": "b"}), "last.pth: model.name was 'a', is now 'b'"),
        (Config(model={"name": "a", "depth": 2}), "last.pth: model.depth was absent, is now 2"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_named(now, message):
    with pytest.raises(CheckpointError, match=message):
        check_resumable(to_dict(Config()), now, ("seed", "model"), "last.pth")


def test_a_resumed_run_may_change_rates_and_where_weights_came_from():
    now = Config(lr=0.2, model={"name": "a", "drop_path_rate": 0.3, "checkpoint_path": "x.pth", "pretrained": True})
    assert check_resumable(to_dict(Config()), now, ("seed", "model"), "last.pth") == [
        "lr was 0.1, is now 0.2",
        "model.checkpoint_path was absent, is now 'x.pth'",
        "model.drop_path_rate was absent, is now 0.3",
        "model.drop_rate was 0.1, is now absent",
        "model.pretrained was absent, is now True",
    ]


@pytest.mark.parametrize("checksums", [True, False])
def test_a_changed_byte_is_named_or_changes_nothing(tmp_path, checksums):
    path = tmp_path / "last.pth"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    save_checkpoint(path, {"state_dict": {"w": torch.arange(300.0)}, "step": 7})
    torch.serialization.set_crc32_options(before)
    assert load_checkpoint(path)["step"] == 7
    whole, safe = path.read_bytes(), 0
    for place in range(0, len(whole), 7) if checksums else ():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            message = str(error)
            safe += message.startswith(f"{path}: ") and "\n" not in message
        else:
            safe += 1
            assert state["step"] == 7
            assert torch.equal(state["state_dict"]["w"], torch.arange(300.0))
    assert safe == (len(range(0, len(whole), 7)) if checksums else 0)


def test_the_previous_checkpoint_is_kept_and_found_if_the_last_is_damaged(tmp_path, monkeypatch):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS

    def unsupported(*paths):
        raise OSError(95, "Operation not supported")

    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(last, {"step": 1}, PREVIOUS)
    assert not previous.exists()
    save_checkpoint(last, {"step": 2}, PREVIOUS)
    assert [load_checkpoint(path)["step"] for path in (last, previous)] == [2, 1]
    monkeypatch.setattr(checkpoint.os, "link", unsupported)
    save_checkpoint(last, {"step": 3}, PREVIOUS)
    assert [load_checkpoint(path)["step"] for path in (last, previous)] == [3, 2]
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    assert latest_checkpoint(tmp_path) == last
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    assert latest_checkpoint(tmp_path) == previous
    last.unlink()
    assert latest_checkpoint(tmp_path) == previous
    previous.write_bytes(whole[:-100])
    last.write_bytes(whole[:-100])
    assert latest_checkpoint(tmp_path) == last
