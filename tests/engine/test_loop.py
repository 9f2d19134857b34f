"""Seeds, order of samples, optimizer groups, schedules and what a command prints when it fails."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dat.engine.backbones import create_timm_model
from dat.engine.command import advise_resuming, main_guard
from dat.engine.distributed import Distributed, prepare_output, setup_distributed, stop_on_sigterm
from dat.engine.loaders import EpochBatchSampler
from dat.engine.optim import (
    check_gradients,
    clip_gradients,
    layer_scales,
    make_optimizer,
    make_scheduler,
    param_groups,
    scaled_lr,
    step_unless,
)
from dat.engine.seeds import isolated_rng, seed_device, seed_everything
from dat.utils.errors import ConfigError, DataError, NonFiniteError


def draw():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()


def test_seeds_are_a_function_of_seed_and_counters():
    seed_everything(0, 5, 1)
    first = draw()
    seed_everything(0, 5, 1)
    assert draw() == first
    for other in [(1, 5, 1), (0, 6, 1), (0, 5, 2), (0, 5)]:
        seed_everything(*other)
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    seed_everything(0, 5)
    first = draw()
    seed_everything(0, 5, 0)
    assert draw() != first


def test_seeding_the_device_leaves_other_generators_alone():
    seed_everything(0, 5, 1)
    expected, *others = draw()
    seed_everything(3)
    _, *untouched = draw()
    seed_everything(3)
    seed_device(torch.device("cpu"), 0, 5, 1)
    drawn, *kept = draw()
    assert drawn == expected
    assert kept == untouched != others


def test_isolated_randomness_leaves_no_trace():
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    with isolated_rng(0, 1, 2):
        inside = draw()
    assert draw() == expected
    with isolated_rng(0, 1, 2):
        assert draw() == inside


def test_batches_cover_an_epoch_once_over_all_processes():
    samplers = [EpochBatchSampler(25, 4, seed=1, rank=rank, world_size=2) for rank in range(2)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(b) for b in batches] == [3, 3] == [len(sampler) for sampler in samplers]
    indices = [index for per_rank in batches for batch in per_rank for _, index in batch]
    assert len(set(indices)) == len(indices) == 24
    assert max(indices) < 25


def test_the_order_depends_on_seed_and_epoch_and_can_be_entered_anywhere():
    sampler = EpochBatchSampler(20, 4, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_position(0, 2)
    assert list(sampler) == first[2:]
    assert len(sampler) == 3
    sampler.set_position(0, 5)
    assert list(sampler) == []
    assert len(sampler) == 0
    sampler.set_position(1)
    second = list(sampler)
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert [i for b in second for _, i in b] != [i for b in first for _, i in b]
    assert list(EpochBatchSampler(20, 4, seed=2)) != first


def test_the_samples_of_a_step_do_not_depend_on_how_it_is_split():
    def steps(batch_size, world_size, accumulate):
        """The samples of each step, in the order of parts and processes."""
        samplers = [EpochBatchSampler(50, batch_size, 1, rank, world_size, accumulate) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_position(2, 1)
        batches = [list(sampler) for sampler in samplers]
        assert [len(b) for b in batches] == [3 * accumulate] * world_size == [len(sampler) for sampler in samplers]
        order = [item for parts in zip(*batches, strict=True) for batch in parts for item in batch]
        return [order[i : i + 12] for i in range(0, len(order), 12)]

    whole = steps(12, 1, 1)
    assert [len(step) for step in whole] == [12] * 3
    for split in [(6, 2, 1), (6, 1, 2), (2, 3, 2), (2, 2, 3)]:
        assert steps(*split) == whole


def test_a_small_data_set_still_fills_one_batch():
    (batch,) = EpochBatchSampler(3, 8, seed=0)
    assert len(batch) == 8
    assert {index for _, index in batch} == {0, 1, 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.table = nn.Parameter(torch.zeros(2, 2))

    def no_weight_decay(self):
        return {"table"}


def test_groups_scale_rates_and_spare_biases():
    model = Net()
    model.head.bias.requires_grad_(False)
    groups = param_groups(model, 0.5, 0.1, {"^backbone": 0.1})
    found = {
        id(p): (g["lr"], g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]
    }  # fmt: skip
    assert found == {
        id(model.backbone.weight): (0.5, 0.1, 0.1),
        id(model.backbone.bias): (0.5, 0.1, 0.0),
        id(model.head.weight): (0.5, 1.0, 0.1),
        id(model.table): (0.5, 1.0, 0.0),
    }
    nested = param_groups(nn.ModuleDict({"a": model}), 0.5, 0.1)
    assert [g["weight_decay"] for g in nested for p in g["params"] if p is model.table] == [0.0]
    with pytest.raises(ConfigError, match="'^bakbone' matches no parameter".replace("^", r"\^")):
        param_groups(model, 0.5, 0.1, {"^bakbone": 0.1})


def test_rates_follow_the_images_of_a_step():
    assert scaled_lr(1e-3, 4, 0) == 1e-3
    assert scaled_lr(1e-3, 8, 32) == pytest.approx(5e-4)
    assert scaled_lr(1e-3, 8, 32, "linear") == pytest.approx(2.5e-4)


def test_rates_of_layers_fall_from_the_head_down():
    model = create_timm_model({"name": "test_vit"}, num_classes=3)
    scales = layer_scales(model, 0.5)
    assert scales.keys() == {name for name, _ in model.named_parameters()}
    assert scales["head.weight"] == 1
    blocks = [scales[f"blocks.{i}.mlp.fc1.weight"] for i in range(len(model.blocks))]
    assert all(upper == 2 * lower for lower, upper in itertools.pairwise(blocks))
    assert scales["patch_embed.proj.weight"] == blocks[0] / 2
    groups = param_groups(model, 1.0, 0.1, {"^head": 0.1}, scales)
    found = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert found[id(model.head.weight)] == pytest.approx(0.1)
    assert found[id(model.patch_embed.proj.weight)] == scales["patch_embed.proj.weight"]


def rates(steps, **arguments):
    optimizer = torch.optim.AdamW(param_groups(Net(), 1.0, 0.1, {"^backbone": 0.1}))
    scheduler = make_scheduler(optimizer, **arguments)
    found = []
    for step in range(steps):
        scheduler.step_update(step)
        scales = {round(group["lr"] / group["lr_scale"], 9) for group in optimizer.param_groups}
        assert len(scales) == 1
        found.append(scales.pop())
    return found


def test_schedules_count_optimizer_steps():
    assert rates(6, total_steps=6, kind="step", decay_steps=[2, 4]) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(5, total_steps=6, kind="step", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    cosine = rates(101, total_steps=100, warmup_steps=10, min_lr=0.01)
    assert cosine[:10] == sorted(cosine[:10])
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert cosine[50] == pytest.approx(0.505)
    assert cosine[100] == pytest.approx(0.01)


def test_a_schedule_of_one_step_is_no_news(caplog):
    assert rates(1, total_steps=1, min_lr=0.01) == [1]
    assert rates(1, total_steps=1, warmup_steps=1) == [0.5]
    assert not caplog.records


def test_gradients_are_clipped_by_their_total_norm():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, 0.0) == 5
    assert torch.equal(model.weight.grad, torch.tensor([[3.0, 4.0]]))
    assert clip_gradients(model, 1.0) == 5
    assert torch.allclose(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    check_gradients(model, "step 1")
    model.weight.grad[0, 0] = float("nan")
    assert not clip_gradients(model, 1.0).isfinite()
    with pytest.raises(
        NonFiniteError, match=r"step 1: first non-finite tensor is the gradient of weight \(1, 2\): \d NaN"
    ):
        check_gradients(model, "step 1")


def test_a_step_can_be_skipped_without_a_trace():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(param_groups(model, 0.1, 0.1), "adamw", 0.1, 0.1)
    steps = []
    for skip in (False, True, False):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if skip else 1.0)
        before = [parameter.clone() for parameter in model.parameters()]
        step_unless(optimizer, torch.tensor(skip))
        unchanged = all(map(torch.equal, before, model.parameters()))
        assert unchanged is skip
        steps.append(optimizer.state[model.weight]["step"].item())
    assert steps == [1, 1, 2]
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_optimizers_are_those_of_timm():
    groups = param_groups(Net(), 0.1, 0.1)
    assert make_optimizer(groups, "adamw", 0.1, 0.1).defaults["fused"]
    assert isinstance(make_optimizer(groups, "sgd", 0.1, 0.1), torch.optim.SGD)
    with pytest.raises(ConfigError, match=r"train.optimizer: timm cannot make 'adamq'"):
        make_optimizer(groups, "adamq", 0.1, 0.1)


def test_model_errors_name_the_key():
    assert create_timm_model({"name": "test_vit", "depth": 1}, num_classes=3).num_classes == 3
    with pytest.raises(ConfigError, match=r"model.backbone.name: no timm model 'resnet81'; did you mean"):
        create_timm_model({"name": "resnet81"})
    with pytest.raises(ConfigError, match=r"model.backbone.name is None, should be the name of a timm model"):
        create_timm_model({"drop_rate": 0.1})
    with pytest.raises(ConfigError, match=r"model.backbone: timm cannot make 'test_vit' .*depht"):
        create_timm_model({"name": "test_vit", "depht": 1})
    with pytest.raises(ConfigError, match=r"model.backbone.num_classes is set by this command"):
        create_timm_model({"name": "test_vit", "num_classes": 3}, num_classes=4)


def test_devices_that_do_not_exist_are_refused():
    assert setup_distributed("cpu") == Distributed(0, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"train.device is 'tpu'"):
        setup_distributed("tpu")


def test_cuda_without_a_number_stays_the_gpu_that_is_current(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert setup_distributed().device == torch.device("cuda:1")


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}])
def test_a_job_that_lacks_its_variables_is_one_line(monkeypatch, variables):
    """A shell of SLURM has some of them, though it started one process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"):
        # Set first, so that what timm sets is removed afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in ({"SLURM_LOCALID": "0"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"asks for several processes, but .* expected, but not set; start them with"):
        setup_distributed("cpu")


ALONE = Distributed(0, 1, torch.device("cpu"))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run = tmp_path / "run"
    assert prepare_output(run, False, ALONE) is None
    assert prepare_output(run, True, ALONE) is None
    assert not run.exists()
    run.mkdir()
    (run / "last.pth").touch()
    assert prepare_output(run, True, ALONE) == run / "last.pth"
    with pytest.raises(ConfigError, match=r"holds a run; go on with train.resume=true"):
        prepare_output(run, False, ALONE)
    with pytest.raises(ConfigError, match="is a file"):
        prepare_output(run / "last.pth", False, ALONE)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"output: \S+loop is a file or a broken link"):
        prepare_output(tmp_path / "loop", True, ALONE)


def prepare_as(rank, store, output, resume, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # a machine of its own, on which the second process looks for the same path
    os.chdir(output / str(rank))
    try:
        answer = str(prepare_output("run", resume, Distributed(rank, 2, torch.device("cpu"))))
    except ConfigError as error:
        answer = f"error: {error}"
    answers.put((rank, answer))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("holders", "resume", "expected"),
    [
        ([0, 1], True, "run/last.pth"),
        ([0], True, "error: output: not every machine has run/last.pth"),
        ([0], False, "error: output: run holds a run"),
        ([1], False, "None"),
    ],
)
def test_processes_agree_on_what_to_resume(tmp_path, holders, resume, expected, fork):
    for rank in (0, 1):
        (tmp_path / str(rank) / "run").mkdir(parents=True)
    for rank in holders:
        (tmp_path / str(rank) / "run/last.pth").touch()
    answers = fork.Queue()
    processes = [
        fork.Process(target=prepare_as, args=(rank, tmp_path / "store", tmp_path, resume, answers)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert found[0] == found[1]
    assert found[0].startswith(expected)


READERS = """
import os, signal, sys, time
from torch.utils.data import Dataset
from dat.engine.distributed import stop_on_sigterm
from dat.engine.loaders import Loader

class Slow(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        time.sleep(0.01)
        return i

def main():
    with stop_on_sigterm() as stop:
        loader = Loader(Slow(), 2, pin=False, batch_size=2)
        initialize = loader.worker_init_fn
        def starting(worker):
            os.killpg(0, signal.SIGTERM)
            initialize(worker)
        loader.worker_init_fn = starting
        batches = iter(loader)
        next(batches)
        os.killpg(0, signal.SIGTERM)
        seen = 1 + sum(1 for _ in batches)
        print(seen, stop.received, flush=True)
        batches = iter(Loader(Slow(), 2, pin=False, batch_size=2))
        # One of each worker: torch's would outlive a main process that ended while they start.
        next(batches), next(batches)
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the traceback keeps the batches, and with them the workers")

main()
"""


@pytest.mark.parametrize(("end", "code"), [("raises", 1), ("killed", -signal.SIGKILL)])
def test_workers_outlive_a_sigterm_to_the_group_also_while_they_start_but_not_the_main_process(end, code):
    arguments = [sys.executable, "-c", READERS, end]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            # workers hold the pipes: this returns once the last of them has ended
            output, errors = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert output == "20 True\n", errors
    assert process.returncode == code


def test_sigterm_is_noted_until_the_run_stops(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        with pytest.raises(SystemExit) as ended:
            stop.exit(ALONE)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "train.resume=true" in capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a.yaml: wrong\n  key"), 1, "error: a.yaml: wrong key\n"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 1, "error: x.json: No such file or directory\n"),
        (DataError("Caught it.\nOriginal Traceback:\n  at x\ndat.DataError: bad: picture"), 1, "error: bad: picture\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("it goes on"), 130, "interrupted; it goes on\n"),
    ],
)
def test_errors_for_people_are_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as ended:
        main_guard(failing(error))
    assert ended.value.code == code
    assert capsys.readouterr().err == line


def test_an_interrupted_training_says_how_it_goes_on(capsys):
    def train():
        with advise_resuming():
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        main_guard(train)
    assert capsys.readouterr().err == "interrupted; train.resume=true goes on from the last checkpoint\n"


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        main_guard(failing(ZeroDivisionError()))
