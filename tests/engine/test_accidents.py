"""A full disk and a killed worker are one line; logs and checkpoints stay whole."""

import errno
import json
import os
import re
import resource
import signal
import sys

import pytest
import torch
from test_trainer import ALONE, Config, Points, ToyTrainer, lines, make
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from dat.engine.checkpoint import load_checkpoint
from dat.engine.command import error_line, main_guard
from dat.engine.loaders import Loader
from dat.utils.errors import TooManyFilesError
from dat.utils.files import write_json


def fails(capsys, function):
    """Runs a command that must fail; returns its last line, and checks that there is no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main_guard(function)
    text = capsys.readouterr().err
    assert raised.value.code == 1
    assert "Traceback" not in text
    assert text.count("error: ") == 1
    return text.strip().splitlines()[-1]


class Full:
    """A file on a disk that is full after so many characters."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            self.file.write(text[: self.room])
            raise OSError(28, "No space left on device")
        return self.file.write(text)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("name", ["log.jsonl", "train.log"])
def test_a_log_on_a_full_disk_ends_the_run_and_keeps_its_checkpoint(tmp_path, monkeypatch, capsys, name):
    run = tmp_path / "run"
    make(tmp_path / "whole", epochs=3).run()
    trainer = make(run, epochs=3)
    epoch = trainer.finish_epoch

    def finish_epoch():
        epoch()
        if name == "log.jsonl":
            trainer.logger._lines = Full(trainer.logger._lines, 50)
        else:
            (handler,) = [
                h for h in trainer.logger._logger.root.handlers if getattr(h, "baseFilename", "") == str(run / name)
            ]
            handler.stream = Full(handler.stream, 20)

    monkeypatch.setattr(trainer, "finish_epoch", finish_epoch)
    line = fails(capsys, trainer.run)
    assert line.startswith(f"error: {run}: No space left on device: ")
    assert line.endswith(f" MiB are free in {run}; finished files are intact")
    assert load_checkpoint(run / "last.pth")["step"] in (3, 6)
    assert make(run, True, epochs=3).run()["steps"] == 9
    first, second = (load_checkpoint(tmp_path / folder / "last.pth")["state_dict"] for folder in ("whole", "run"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [line["step"] for line in lines(run)] == list(range(1, 10))


def test_a_file_on_a_full_disk_is_named_and_not_half_written(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    write_json(tmp_path / "x.json", [1])
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        line = fails(capsys, lambda: write_json(tmp_path / "x.json", list(range(100_000))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert line.startswith(f"error: {tmp_path}/x.json: File too large: ")
    assert line.endswith("; the old file is kept")
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert len(list(tmp_path.iterdir())) == 1


class DeadlyPoints(Points):
    def __getitem__(self, item):
        if item[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


class DeadlyTrainer(ToyTrainer):
    """The worker of its loader is killed in the second epoch."""

    def build_loaders(self):
        sampler, _, val_loader = super().build_loaders()
        return sampler, DataLoader(DeadlyPoints(), batch_sampler=sampler, num_workers=1), val_loader


def test_a_killed_worker_is_one_line_and_the_run_goes_on(tmp_path, capsys):
    config = Config(output=str(tmp_path))
    line = fails(capsys, lambda: DeadlyTrainer(config, ALONE).run())
    # torch notices it by the signal of the worker, or because no batch comes.
    assert re.match(r"error: a worker that reads images ended \(process \d+ (is killed by signal: Killed|exited)", line)
    assert "lower train.workers" in line
    assert len(lines(tmp_path)) == 3
    assert make(tmp_path, True).run()["steps"] == 6


def test_too_many_files_in_a_worker_are_one_line_too():
    try:
        raise TooManyFilesError
    except TooManyFilesError:
        passed_on = ExceptionWrapper(where="in a worker")
    with pytest.raises(TooManyFilesError) as caught:
        passed_on.reraise()
    assert error_line(caught.value) == str(TooManyFilesError())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork safely")
def test_workers_are_forked_whatever_python_starts_by_default():
    loader = Loader(Points(), 1, pin=False)
    assert loader.multiprocessing_context.get_start_method() == "fork"


def allocate():
    return torch.empty(2**62, dtype=torch.uint8)


def ask():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def open_all(path):
    """Opens more files than the process may have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 5, limits[1]))
    files = []
    try:
        for _ in range(100):
            files.append(path.open("w"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in files:
            file.close()


def test_too_little_memory_and_too_many_files_are_one_line(tmp_path, capsys):
    assert fails(capsys, allocate).startswith("error: the memory of the machine does not suffice; lower train.batch")
    assert fails(capsys, ask).startswith("error: the memory of the GPU does not suffice; lower train.batch_size")
    assert fails(capsys, lambda: open_all(tmp_path / "x")).startswith("error: too many open files; raise their limit")


def test_a_name_of_a_file_without_end_is_cut():
    error = OSError(errno.ENAMETOOLONG, "File name too long", "0" * 90_000)
    assert error_line(error) == f"{'0' * 900} ...: File name too long"
