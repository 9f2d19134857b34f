"""Ends trainings at random moments, and compares what they end with to trainings that ran through.

    python -m tests.kills [--kills 20] [--tasks detection classification] [--workers 0 2] [--spread 3] [--seed 0]

Each session ends in one of four ways by turns: SIGKILL or SIGTERM to the process group, SIGKILL to a worker of the
loader (without workers SIGKILL to the process), or a full disk, for which a limit on the size of files stands. It ends
up to `--spread` seconds after its first step. The runs are in `--out`.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from dat.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]

WAYS = ("SIGKILL", "SIGTERM", "worker", "full disk")

# what two equal runs measure differently
MEASURED = {"images_per_second", "eta_seconds", "memory_gib", "seconds"}


def spawn(task, config, *overrides):
    """The command, in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"{task}.train", str(config), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip


def wait_for_a_step(output, process, start):
    """Until the process has logged a step past the checkpoint that it went on from."""
    log, last = output / "log.jsonl", output / "last.pth"
    begin = load_checkpoint(last)["step"] if last.exists() else 0
    while process.poll() is None and time.time() < start + 120:
        if log.exists() and log.stat().st_mtime > start:
            lines = log.read_text().splitlines()
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] > begin:
                return
        time.sleep(0.005)
    raise AssertionError(f"no step came: {process.stderr.read()}")


def end(process, way):
    """Ends a session; returns the exit code and the last line that it should end with, None: any."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if way == "full disk":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return 1, "error: "
    if way == "worker" and children:
        os.kill(int(children[0]), signal.SIGKILL)
        return 1, "error: "
    number = signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:
        return 128 + number, "stopped by SIGTERM; go on with train.resume=true"
    return -number, ""


def train_killed(task, config, output, kills, seed, spread, overrides=(), ways=WAYS):
    """Trains into `output` with so many kills; returns (way, last step of the checkpoint) of each."""
    moments, killed = random.Random(seed), []
    while len(killed) < kills:
        way = ways[len(killed) % len(ways)]
        start = time.time()
        with spawn(task, config, *overrides, f"output={output}", "train.resume=true") as process:
            wait_for_a_step(output, process, start)
            time.sleep(moments.uniform(0, spread))
            assert process.poll() is None, f"ended before it was killed: {process.stderr.read()}"
            code, line = end(process, way)
            text = process.communicate(timeout=120)[1]
        assert process.returncode == code, text
        assert "Traceback" not in text, text
        assert text.strip().splitlines()[-1].startswith(line) if line else True, text
        # What is there is whole, whatever was being written.
        for path in output.glob("*.pth"):
            if ".tmp" not in path.name:
                load_checkpoint(path)
        killed.append((way, load_checkpoint(output / "last.pth")["step"] if (output / "last.pth").exists() else 0))
    with spawn(task, config, *overrides, f"output={output}", "train.resume=true") as process:
        _, text = process.communicate()
    assert process.returncode == 0, text
    assert not [path.name for path in output.rglob("*") if ".tmp" in path.name or path.name == "run.lock"]
    return killed


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
    """The lines of the log, without what is measured."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def write_data(task, folder):
    """A tiny data set of the task's tests, and the configuration of a run on it."""
    sys.path.insert(0, str(Path(__file__).parent))
    folder.mkdir(parents=True)
    if task == "detection":
        from coco_scenes import scenes_in, write_config

        return write_config(folder, scenes_in(folder))
    from class_folders import make_settings, write_splits

    write_splits(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(make_settings(folder)), encoding="utf-8")
    return path


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="new folder for data and runs")
    parser.add_argument("--tasks", nargs="+", default=["detection", "classification"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--kills", type=int, default=20, help="of each task")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--spread", type=float, default=3.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for task in options.tasks:
        config = write_data(task, options.out / task)
        for workers in options.workers:
            overrides = [f"train.epochs={options.epochs}", f"train.workers={workers}", "train.checkpoint_steps=3"]
            killed, whole = (options.out / task / f"{name}_{workers}" for name in ("killed", "whole"))
            kills = options.kills // len(options.workers)
            for way, step in train_killed(task, config, killed, kills, options.seed, options.spread, overrides):
                print(f"{task}, {workers} workers, {way}: went on from step {step}", flush=True)
            with spawn(task, config, *overrides, f"output={whole}") as process:
                _, text = process.communicate()
            assert process.returncode == 0, text
            assert_same_run(whole, killed)
            print(f"{task}, {workers} workers: the same weights, optimizer state and log as without", flush=True)


if __name__ == "__main__":
    main()
