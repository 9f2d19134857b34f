"""A process that fails or is killed takes the others with it, soon and with its error."""

import os
import time

import pytest
import torch
from processes import run_processes

from dat.engine.command import main_guard
from dat.engine.distributed import setup_distributed
from dat.utils.errors import DataError


def job(how, failing, waits, moment):
    def main():
        distributed = setup_distributed("cpu")
        distributed.sum(torch.zeros(1))
        if how == "ends":
            return
        if distributed.rank == failing:
            moment.write_text(str(time.time()))
            if how == "killed":
                os.kill(os.getpid(), 9)
            raise ZeroDivisionError("oops") if how == "defect" else DataError("cat.jpg: cannot be read")
        if waits:
            # what NCCL does: it waits, and nothing wakes it
            time.sleep(100)
        distributed.sum(torch.zeros(1))
        time.sleep(100)

    main_guard(main)


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("how", "waits", "code", "own", "theirs"),
    [
        ("data", False, 1, "error: cat.jpg: cannot be read\n", "failed: cat.jpg: cannot be read\n"),
        ("killed", True, -9, "", "was killed, or its machine failed\n"),
        ("killed", False, -9, "", "was killed, or its machine failed\n"),
        ("defect", True, 1, "Traceback", "failed: ZeroDivisionError: oops\n"),
    ],
)
def test_the_failure_of_one_process_ends_all_with_its_words(tmp_path, failing, how, waits, code, own, theirs):
    codes, errors, ended = run_processes(3, job, tmp_path, how, failing, waits, tmp_path / "moment")
    others = [rank for rank in range(3) if rank != failing]
    assert codes[failing] == code
    assert own in errors[failing]
    for rank in others:
        assert codes[rank] == 1
        assert errors[rank].startswith(f"error: process {failing} ")
        assert errors[rank].endswith(theirs)
        assert errors[rank].count("\n") == 1
    assert max(ended) - float((tmp_path / "moment").read_text()) < 30


def test_processes_that_finish_do_not_end_each_other(tmp_path):
    codes, errors, _ = run_processes(3, job, tmp_path, "ends", 0, False, tmp_path / "moment")
    assert codes == [0, 0, 0]
    assert not any("error" in text for text in errors)
