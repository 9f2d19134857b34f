"""Only one training at a time writes to a folder; killed ones leave nothing that stops the next."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dat.engine.distributed import Distributed
from dat.engine.lock import NAME, RunLock, lock_run
from dat.utils.errors import ConfigError
from dat.utils.files import atomic_write

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from pathlib import Path
from dat.engine.lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_training_names_the_first(tmp_path, holder):
    message = rf"output: \S+run is in use: process {holder.pid} on {socket.gethostname()} writes to it since 20"
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            lock_run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()
    with lock_run(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_may_lock_again_what_it_holds(tmp_path):
    first = lock_run(tmp_path)
    second = lock_run(tmp_path)
    assert first is second
    del first, second
    assert not (tmp_path / NAME).exists()


def test_a_link_that_leads_to_itself_is_no_folder(tmp_path):
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(ConfigError, match=r"output: \S+run is a file or a broken link, should be a folder"):
        lock_run(tmp_path / "run")


def test_a_forked_worker_neither_holds_nor_drops_the_lock(tmp_path, fork):
    with lock_run(tmp_path) as lock:
        worker = fork.Process(target=lock.__exit__)
        worker.start()
        worker.join()
        assert (tmp_path / NAME).exists()


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ({"process": 2**22 + 1, "host": socket.gethostname(), "start": "now"}, None),
        ({"process": os.getppid(), "host": socket.gethostname(), "start": "now"}, "is in use: process"),
        ({"process": 1, "host": "elsewhere", "start": "now"}, f"process 1 on elsewhere .* then delete its {NAME}"),
        ([], None),
    ],
)
def test_without_locks_of_the_file_system_the_content_decides(tmp_path, monkeypatch, owner, message):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    (tmp_path / NAME).write_text(json.dumps(owner))
    if message is None:
        with RunLock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    else:
        with pytest.raises(ConfigError, match=message):
            RunLock(tmp_path)


def lock_as(rank, folder, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with lock_run(folder / "run", Distributed(rank, 2, torch.device("cpu"))):
            answers.put("locked")
    except ConfigError as error:
        answers.put(str(error))
    torch.distributed.destroy_process_group()


def test_all_processes_of_a_job_end_with_the_same_error(tmp_path, holder, fork):
    answers = fork.Queue()
    processes = [fork.Process(target=lock_as, args=(rank, tmp_path, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert f"is in use: process {holder.pid} " in found.pop()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    names = ["last.4194305-0123abcd.tmp.pth", "tensorboard/x.4194305-0123abcd.tmp"]
    kept = ["last.pth", "notes.tmp", f"log.{os.getppid()}-0123abcd.tmp.jsonl"]
    for name in names + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with lock_run(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / ("x" * 250 + ".txt")
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
