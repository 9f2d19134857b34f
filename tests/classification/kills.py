"""Kills a training at random moments, and compares what it ends with to a training that ran through.

    python -m tests.classification.kills CONFIG [key.path=value ...] [--kills 10] [--spread 5] [--seed 0]

Signals are SIGKILL and SIGTERM by turns, to the whole process group, up to `--spread` seconds after the first step of a
session. The runs are in the folders killed/ and whole/ of `--out`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from dat.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]

# what two equal runs measure differently
MEASURED = {"images_per_second", "eta_seconds", "memory_gib", "seconds"}


def spawn(config, *overrides):
    """The command, in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "classification.train", str(config), *overrides]
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


def train_killed(config, output, kills, seed, spread, overrides=()):
    """Trains into `output` with so many kills; returns (signal, last step of the checkpoint) of each."""
    moments, killed = random.Random(seed), []
    while len(killed) < kills:
        number = (signal.SIGKILL, signal.SIGTERM)[len(killed) % 2]
        start = time.time()
        with spawn(config, *overrides, f"output={output}", "train.resume=true") as process:
            wait_for_a_step(output, process, start)
            time.sleep(moments.uniform(0, spread))
            assert process.poll() is None, f"ended before it was killed: {process.stderr.read()}"
            os.killpg(process.pid, number)
            code, text = process.wait(120), process.stderr.read()
        assert code == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number], text
        if number == signal.SIGTERM:
            assert text.strip().splitlines()[-1] == "stopped by SIGTERM; go on with train.resume=true"
        killed.append(
            (number.name, load_checkpoint(output / "last.pth")["step"] if (output / "last.pth").exists() else 0)
        )
    with spawn(config, *overrides, f"output={output}", "train.resume=true") as process:
        _, text = process.communicate()
    assert process.returncode == 0, text
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


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.classification.kills", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="folder of the two runs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--spread", type=float, default=5.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    killed, whole = options.out / "killed", options.out / "whole"
    for name, step in train_killed(
        options.config, killed, options.kills, options.seed, options.spread, options.overrides
    ):  # fmt: skip
        print(f"{name}: went on from step {step}", flush=True)
    with spawn(options.config, *options.overrides, f"output={whole}") as process:
        _, text = process.communicate()
    assert process.returncode == 0, text
    assert_same_run(whole, killed)
    print("the same weights, averaged weights, optimizer state and log as without")


if __name__ == "__main__":
    main()
