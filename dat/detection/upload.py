"""Decodes uploads in processes of their own, so that no file costs the server its time or memory."""

import io
import json
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dat.utils.errors import UserError
from dat.utils.images import UNREADABLE, check_size, read_image

FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}
# Bytes that a process may take to decode an image: per pixel (several copies, 32 bits per channel) and besides.
BYTES_PER_PIXEL, OTHER_BYTES = 64, 2**28
# Signals that end a server, often sent to all of its processes.
ENDING = {signal.SIGINT, signal.SIGTERM}


class Refused(UserError):
    """An upload that cannot be used; `status` is that of HTTP."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of one image: its pixels, and the seconds that decoding may take."""

    pixels: int
    seconds: float


class DecodePool:
    """Processes that decode images, one at a time each, once `start` was called.

    Args:
        count: number of processes.
        limits: of each image.
    """

    def __init__(self, count: int, limits: DecodeLimits) -> None:
        methods = multiprocessing.get_all_start_methods()
        # A forked copy of the server would inherit its threads, sockets and model.
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__])
        self._workers = [_Worker(context, limits) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def start(self) -> None:
        """Starts the processes, which takes seconds, in the background."""
        # Python waits for other threads before it exits, and so for processes that are only being started.
        threading.Thread(target=self._start, daemon=True).start()

    def _start(self) -> None:
        for worker in self._workers:
            # A process that does not start now is started again for an image, whose answer then says so.
            with suppress(OSError, RuntimeError):
                worker.start()
            self._idle.put(worker)

    def decode(self, content: bytes | bytearray) -> Image.Image:
        """An image file in RGB; waits for a process that is free. Raises Refused."""
        worker = self._idle.get()
        try:
            return worker.decode(content)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for worker in self._workers:
            worker.close()
        # Threads that wait for a process take this one in turn, and are refused.
        self._idle.put(self._workers[0])


class _Worker:
    """A process that decodes images, used by one thread at a time; it is started again after one that ended it."""

    def __init__(self, context: BaseContext, limits: DecodeLimits) -> None:
        self.context, self.limits = context, limits
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self.closed = False

    def start(self) -> None:
        """Starts the process if there is none. It may fail: then there is none afterwards either."""
        if self.process is not None or self.closed:
            return
        try:
            connection, other = self.context.Pipe()
        except OSError:
            return
        process = self.context.Process(target=_work, args=(other, self.limits), daemon=True)  # type: ignore[attr-defined]
        # The process from which others are forked imports torch first, and would end with a traceback: it inherits
        # that the signals wait. Starting the tracker would let them through again.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            process.start()
        except (EOFError, OSError):
            connection.close()
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            other.close()
        self.process, self.connection = process, connection
        # The server may have been closed in the meantime.
        if self.closed:
            process.kill()

    def decode(self, content: bytes | bytearray) -> Image.Image:
        self.start()
        if self.closed:
            raise Refused(503, "the server is stopping")
        if self.connection is None:
            raise Refused(503, "no process starts to decode the image, try again later")
        try:
            self.connection.send_bytes(content)
            # JSON and pixels: a pickle could run code of a process that a file has taken over.
            answer = json.loads(self.connection.recv_bytes())
            if "reason" in answer:
                raise Refused(answer["status"], answer["reason"])
            return Image.frombytes("RGB", answer["size"], self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise Refused(*self._reap()) from error

    def _reap(self) -> tuple[int, str]:
        """Forgets a process that has ended; returns the status and the reason."""
        process, self.process, self.connection = self.process, None, None
        if process is not None and not self.closed:
            process.join(5)
            process.kill()
        if process is None or self.closed or process.exitcode == -signal.SIGTERM:
            return 503, "the server is stopping"
        if process.exitcode == -signal.SIGALRM:
            return 413, f"decoding the image takes more than {self.limits.seconds:g} seconds"
        return 400, "the image is damaged: decoding it fails"

    def close(self) -> None:
        self.closed = True
        process = self.process
        if process is not None:
            process.kill()


def _work(connection: Connection, limits: DecodeLimits) -> None:
    """Answers image files with their size and pixels, or with the reason why not, until the connection ends."""
    # Interrupting the command interrupts its processes too; the server ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    _limit_memory(limits.pixels * BYTES_PER_PIXEL + OTHER_BYTES)
    # Importing Pillow's plugins is not the time of the first image.
    Image.init()
    while True:
        try:
            content = connection.recv_bytes()
        except (EOFError, OSError):
            return
        # The default action ends the process, inside of a library too.
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        try:
            image = decode(content, limits.pixels)
        except Refused as error:
            answer: Iterable[bytes] = [json.dumps({"status": error.status, "reason": str(error)}).encode()]
        else:
            answer = [json.dumps({"size": image.size}).encode(), image.tobytes()]
        signal.setitimer(signal.ITIMER_REAL, 0)
        for part in answer:
            connection.send_bytes(part)


def _limit_memory(size: int) -> None:
    """Limits the address space of the process to `size` bytes more than it has; where the system does not say: not."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    limit = pages * os.sysconf("SC_PAGE_SIZE") + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def decode(content: bytes, pixels: int) -> Image.Image:
    """An image file in RGB. Raises Refused, before anything large is decoded where there are more than `pixels`."""
    try:
        # Reads the header only.
        with Image.open(io.BytesIO(content), formats=list(FORMATS)) as head:
            width, height = head.size
    except UnidentifiedImageError as error:
        if content.startswith(b"--") and b"Content-Disposition:" in content[:1000]:
            text = "the body is a form, should be the image file alone, as curl --data-binary @photo.jpg sends it"
            raise Refused(415, text) from error
        raise Refused(415, f"not an image of a supported format: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise Refused(413, f"the image has more than {pixels} pixels") from error
    except UNREADABLE as error:
        raise Refused(400, f"the image is damaged: {error}") from error
    if width * height > pixels:
        raise Refused(413, f"the image has {width} x {height} pixels, more than {pixels}")
    try:
        image = read_image(io.BytesIO(content))
        check_size(image)
    except UserError as error:
        raise Refused(400, str(error)) from error
    return image
