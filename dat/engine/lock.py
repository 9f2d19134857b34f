"""The lock of a run's folder: two trainings in one folder would destroy each other's files.

The operating system holds the lock and drops it when the process ends, however it ends. A POSIX record lock, unlike
flock, is not inherited by the workers of a loader, which may outlive a killed training by some seconds.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from dat.engine.distributed import Distributed, gather
from dat.utils.errors import ConfigError, one_line
from dat.utils.files import check_folder, process_exists, real_path, remove_leftovers

NAME = "run.lock"


class RunLock(AbstractContextManager["RunLock"]):
    """The lock of the folder `output`, which is created if missing; held until the context or this object ends.

    The file run.lock says for people which process holds it: {"process", "host", "start"}. A file that a killed process
    left is taken over. Where the file system has no locks, a file of another host counts as held until it is deleted.

    Raises:
        ConfigError: another process holds the lock; names it.
    """

    def __init__(self, output: Path) -> None:
        self.path, self.process, self.created = output / NAME, os.getpid(), not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
            holder = _lock(self.file)
            if holder:
                self.file.close()
                raise ConfigError(
                    f"output: {output} is in use: {holder}; wait for it, stop it or choose another folder"
                )
            # The last holder may have deleted the file between opening and locking it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    break
            self.file.close()
        owner = {"process": self.process, "host": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps(owner) + "\n")
        self.file.flush()

    def __exit__(self, *error: object) -> None:
        # A forked process has a copy of this object, but not the lock.
        if not self.file.closed and os.getpid() == self.process:
            with suppress(OSError):
                self.path.unlink()
                # A run that could not start leaves no folder; one that is not empty stays.
                if self.created:
                    self.path.parent.rmdir()
            self.file.close()

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.__exit__()


# A process that locks a folder twice, as a notebook does that builds a trainer again, has one lock: closing a second
# descriptor of the file would drop the first one's.
_locks: WeakValueDictionary[Path, RunLock] = WeakValueDictionary()


def lock_run(output: Path, distributed: Distributed | None = None) -> AbstractContextManager[Any]:
    """Locks the folder of a run and removes the temporary files that killed processes left in it.

    Under torchrun the main process holds the lock.

    Raises:
        ConfigError: on every process, if another job holds the lock, or the folder cannot be written.
    """
    lock, error = None, ""
    if distributed is None or distributed.main:
        try:
            check_folder(output, "output")
            place = real_path(output)
            lock = _locks.get(place)
            if lock is None or lock.file.closed:
                lock = _locks[place] = RunLock(output)
            remove_leftovers(output)
        except ConfigError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"output: cannot write to {output}: {failure.strerror or one_line(failure)}"
    # Every process raises the error of the main one, which would otherwise leave the others waiting.
    if distributed is not None and distributed.world_size > 1:
        error = gather(error)[0]
    if error:
        raise ConfigError(error)
    return lock or nullcontext()


def _lock(file: Any) -> str:
    """Locks the open file; returns the process that holds it instead, "" if none does."""
    try:
        owner = json.load(file)
        process, host, start = int(owner["process"]), owner["host"], owner["start"]
    except (ValueError, LookupError, TypeError):
        process, host, start = None, "", ""
    holder = f"process {process} on {host} writes to it since {start}" if process else "another process writes to it"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return holder
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
    # The file system has no locks.
    if process and host != socket.gethostname():
        return f"{holder}, or was killed: then delete its {NAME}"
    return holder if process and process != os.getpid() and process_exists(process) else ""
