"""Several processes of a job, forked from one that has imported much and done nothing: importing takes seconds.

Forked from this process they could not use autograd once a test here has.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# What children would import, each for seconds, were it not there already.
PRELOADED = [
    "dat.detection.commands", "dat.classification.commands", "torch.utils.tensorboard", "matplotlib.pyplot",
    "scipy.optimize", "faster_coco_eval", "fvcore.nn", "onnxscript", "pytest",
]  # fmt: skip


_CONTEXT = multiprocessing.get_context("forkserver")


def start_forkserver():
    """Starts the process that others are forked from, before a test starts one with less in it."""
    _CONTEXT.set_forkserver_preload(PRELOADED)
    folder = os.getcwd()
    # It finds modules by its working directory, and says nothing of those that it does not find.
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder)


def run_processes(count, function, folder: Path, *arguments, timeout=120):
    """Runs function(*arguments) in `count` processes under torchrun's variables.

    Returns their exit codes, what they wrote to stderr, and the moments (time.time()) at which they ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = [folder / f"errors_{rank}" for rank in range(count)]
    processes = [
        _CONTEXT.Process(target=_enter, args=(rank, count, port, errors[rank], function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    ended = [0.0] * count
    deadline = time.time() + timeout
    try:
        while not all(ended) and time.time() < deadline:
            time.sleep(0.05)
            for rank, process in enumerate(processes):
                if process.exitcode is not None and not ended[rank]:
                    ended[rank] = time.time()
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    assert all(ended), [path.read_text() for path in errors]
    return [process.exitcode for process in processes], [path.read_text() for path in errors], ended


def run_command(command, **options):
    """Stands in for subprocess.run of [python, "-m", module, ...]; what it prints goes where this process prints."""
    process = _CONTEXT.Process(target=_run_module, args=(command[2:],))
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


def _run_module(arguments):
    sys.argv = arguments
    torch.set_num_threads(1)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _enter(rank, count, port, errors, function, arguments):
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    # pytest has put its own in the place of the process's
    sys.stderr = os.fdopen(os.open(errors, os.O_WRONLY | os.O_CREAT), "w", buffering=1)
    torch.set_num_threads(1)
    function(*arguments)
