"""Runs commands: errors that a user can fix are printed as one line."""

import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from dat.utils.errors import TooManyFilesError, UserError, too_many_files
from dat.utils.text import echo


def main_guard(main: Callable[[], None]) -> None:
    """Runs a command; UserError, OSError, killed workers and lack of memory are one line and exit code 1, Ctrl-C 130.

    Other exceptions are defects of the program and keep their traceback. Under torchrun the failure of one process ends
    the job: torchrun sends the others SIGTERM within a second and SIGKILL 30 seconds later, if they still wait in a
    collective (measured with gloo: 1 s, and 32 to 34 s while a training run handles SIGTERM).
    """
    # Names in any script must not end a command whose output goes to a file in another encoding.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (UserError, OSError)) and not killed_worker(error) and not lacks_memory(error):
            raise
        if os.environ.get("DAT_TRACEBACK"):
            traceback.print_exc()
        _fail(f"error: {error_line(error)}", 1)
    except KeyboardInterrupt as error:
        _fail("; ".join(filter(None, ("interrupted", str(error)))), 130)
    except SystemExit:
        _leave_process_group()
        raise
    _leave_process_group()


@contextmanager
def advise_resuming() -> Iterator[None]:
    """Makes Ctrl-C inside the block say how a training goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("train.resume=true goes on from the last checkpoint") from error


def killed_worker(error: BaseException) -> str:
    """The number of a DataLoader's worker and the signal that killed it, "" if the error is another."""
    match = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [\w ]+|exited)", str(error))
    return f"process {match[1]} {match[2]}" if match else ""


def lacks_memory(error: BaseException) -> bool:
    """Whether memory of the machine or a GPU did not suffice."""
    if type(error) is RuntimeError:
        return "DefaultCPUAllocator: " in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def error_line(error: BaseException) -> str:
    """The message of an error on one line of at most 1,000 characters."""
    if worker := killed_worker(error):
        return (
            f"a worker that reads images ended ({worker}), often for lack of memory or shared memory (/dev/shm); "
            "lower train.workers or --workers, or the batch size; train.resume=true goes on from the last checkpoint"
        )
    if lacks_memory(error):
        where = "of the GPU" if isinstance(error, torch.OutOfMemoryError) else "of the machine"
        return (
            f"the memory {where} does not suffice; lower train.batch_size (train.accumulate makes up for it), "
            "--batch-size, train.workers or the sizes of images, or set train.grad_checkpointing=true or train.amp=bf16"
        )
    if too_many_files(error):
        return str(TooManyFilesError())
    if isinstance(error, OSError) and error.strerror:
        name = str(error.filename or "")
        name = name if len(name) <= 900 else f"{name[:900]} ..."
        return f"{name}: {error.strerror}" if name else error.strerror
    text = str(error).strip()
    # A DataLoader worker passes its error on as the text of a whole traceback.
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:1000]} ..."


def _fail(message: str, code: int) -> NoReturn:
    echo(message, error=True)
    # A DataLoader whose workers did not all start fails once more when it is deleted, and would print that last.
    sys.unraisablehook = lambda unraisable: None
    if _in_process_group():
        # Leaving a process group in which other processes wait or have failed may never return.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _leave_process_group() -> None:
    if _in_process_group():
        torch.distributed.destroy_process_group()


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
