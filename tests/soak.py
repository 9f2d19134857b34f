"""Serves a small detector on two cores to ordinary and hostile clients for a while, and says what went wrong.

    python -m tests.soak [--minutes 20] [--requests 100000] [--clients 8]

A third of the requests are hostile. No ordinary answer may be lost, wrong or slower than 20 times the median, memory
should be flat after the first minute, and SIGTERM should end the server within 10 seconds. Needs Linux.
"""

import argparse
import http.client
import io
import json
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dat.detection import Detector
from tests.detection.exporting import write_detector

ROOT = Path(__file__).parents[1]
SLOWEST, LONGEST_END, GROWTH = 20, 10.0, 1.05

# Images that decode slowly, claim too many pixels, are cut off, are none or are too large; addresses and pages of
# other sites; an argument that is no number; a body that is no HTTP, and a request for a web socket; clients that end
# within a request, after it, or send half and wait.
HOSTILE = (
    "slow", "bomb", "cut", "text", "large", "host", "origin", "argument", "chunk", "socket", "abort", "leave", "stall",
)  # fmt: skip


def encode(seed: int, form: str) -> bytes:
    """An ordinary image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12 + seed, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((120 + 10 * seed, 90)).save(file, form)
    return file.getvalue()


def slow_jpeg() -> bytes:
    """A progressive JPEG whose last scan is repeated 20,000 times."""
    file = io.BytesIO()
    Image.effect_noise((400, 400), 60).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last : last + 60] * 20_000 + b"\xff\xd9"


def pixel_bomb() -> bytes:
    """A PNG of a few kilobytes that claims 60,000 by 60,000 pixels."""
    content = bytearray(encode(0, "PNG"))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


class Clients:
    """Threads that send requests, and what came of them."""

    def __init__(self, port: int, detector: Detector, requests: int, seconds: float) -> None:
        self.port, self.left, self.seconds = port, requests, seconds
        self.lock = threading.Lock()
        self.images = [encode(seed, form) for seed, form in enumerate(("PNG", "BMP", "PNG", "JPEG", "GIF", "PNG"))]
        self.wanted = [
            [result["bbox"] for result in detector.predict(Image.open(io.BytesIO(image)), threshold=0).to_coco()]
            for image in self.images
        ]
        self.slow, self.bomb = slow_jpeg(), pixel_bomb()
        self.times: list[float] = []
        self.problems: Counter[str] = Counter()
        self.hostile: Counter[tuple[str, str]] = Counter()

    def run(self, seed: int) -> None:
        """Sends requests until there are enough, or the time is over."""
        generator, end = random.Random(seed), time.monotonic() + self.seconds
        while time.monotonic() < end:
            with self.lock:
                self.left -= 1
                number = self.left
            if number < 0:
                return
            if number % 3 == 0:
                self._attack(generator)
            else:
                self.check(generator.randrange(len(self.images)))

    def check(self, chosen: int) -> None:
        """Sends an ordinary image and compares the answer with what the detector finds."""
        begin, problem = time.monotonic(), ""
        try:
            status, answer = self._post(self.images[chosen])
            if status != 200:
                problem = f"status {status}: {answer['detail']}"
            elif [found["bbox"] for found in answer["detections"]] != self.wanted[chosen]:
                problem = "a wrong answer"
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = f"lost: {error!r}"
        with self.lock:
            self.times.append(time.monotonic() - begin)
            self.problems.update([problem] if problem else [])

    def _attack(self, generator: random.Random) -> None:
        image = generator.choice(self.images)
        kind = generator.choice(HOSTILE)
        bodies = {
            "slow": self.slow, "bomb": self.bomb, "cut": image[: len(image) // 2], "text": b"hello",
            "large": bytes(17 * 2**20),
        }  # fmt: skip
        try:
            if kind in ("abort", "leave", "stall"):
                with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
                    head = f"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\n\r\n"
                    connection.sendall(head.encode() + image[: len(image) // (1 if kind == "leave" else 2)])
                    time.sleep(1 if kind == "stall" else 0)
                outcome = "closed"
            elif kind in ("chunk", "socket"):
                head = {
                    "chunk": "POST / HTTP/1.1\r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
                    "socket": "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
                }[kind]
                with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
                    connection.sendall(head.encode())
                    outcome = connection.recv(12).decode()
            else:
                headers = {"host": {"Host": "evil.example"}, "origin": {"Origin": "http://evil.example"}}.get(kind, {})
                path = "/detect?threshold=nan" if kind == "argument" else "/detect"
                outcome = str(self._post(bodies.get(kind, image), headers, path)[0])
        # The server may close the connection before it has read all of a body that it refuses.
        except (OSError, http.client.HTTPException) as error:
            outcome = type(error).__name__
        with self.lock:
            self.hostile[kind, outcome] += 1

    def _post(self, body: bytes, headers: dict[str, str] | None = None, path: str = "/detect") -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, headers or {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def tree(process: int) -> Iterator[int]:
    """A process and its descendants."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from tree(int(child))


def memory(process: int) -> int:
    """Bytes that a process and its descendants keep resident, shared pages by their part."""
    total = 0
    for one in tree(process):
        try:
            total += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.M)[1])
        except (OSError, TypeError):
            continue
    return total * 1024


def main(arguments: list[str] | None = None) -> int:
    """Runs the soak; returns the number of problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        path = write_detector(Path(folder) / "best.pth", box_refine=True)
        command = [sys.executable, "-m", "detection.serve", str(path)]
        more = ["--port", "0", "--device", "cpu", "--max-rate", "1000000"]
        server = subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().split(": ")[0].rpartition(":")[2])
            detector = Detector.from_checkpoint(path, device="cpu")
            clients = Clients(port, detector, options.requests, options.minutes * 60)
            return soak(server, clients, options.clients)
        finally:
            server.kill()


def soak(server: subprocess.Popen, clients: Clients, count: int) -> int:
    """Lets `count` clients at a server, ends it, and prints the problems; returns their number."""
    # The first image waits for the processes that decode to start.
    clients.check(0)
    clients.times.clear()
    threads = [threading.Thread(target=clients.run, args=(seed,)) for seed in range(count)]
    begin, sizes = time.monotonic(), []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        sizes.append((time.monotonic() - begin, memory(server.pid)))
        time.sleep(1)
    seconds = time.monotonic() - begin
    with socket.create_connection(("127.0.0.1", clients.port)) as stalled:
        stalled.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nGIF")
        server.terminate()
        try:
            end, begin = time.monotonic(), time.monotonic()
            server.wait(LONGEST_END)
            end = time.monotonic()
        except subprocess.TimeoutExpired:
            clients.problems[f"the server did not end within {LONGEST_END:g} seconds of SIGTERM"] += 1
    settled = [size for moment, size in sizes if moment >= min(60, seconds / 3)] or [sizes[-1][1]]
    tenth = max(len(settled) // 10, 1)
    first, last = (statistics.median(part) / 2**20 for part in (settled[:tenth], settled[-tenth:]))
    if last > GROWTH * first:
        clients.problems[f"memory grew from {first:.0f} to {last:.0f} MiB"] += 1
    median, slowest = statistics.median(clients.times), max(clients.times)
    if slowest > SLOWEST * median:
        late = sum(duration > SLOWEST * median for duration in clients.times)
        clients.problems[f"slower than {SLOWEST} times the median"] += late
    hostile = clients.hostile.total()
    print(f"{len(clients.times)} ordinary and {hostile} hostile requests in {seconds:.0f} seconds")
    print(f"ordinary answers: median {median * 1e3:.0f} ms, slowest {slowest * 1e3:.0f} ms")
    print(f"memory: {first:.0f} MiB at first, {last:.0f} MiB at last; ended {end - begin:.1f} seconds after SIGTERM")
    for (kind, outcome), number in sorted(clients.hostile.items()):
        print(f"  {kind}: {outcome}, {number} times")
    for problem, number in clients.problems.most_common():
        print(f"PROBLEM: {problem}, {number} times")
    return clients.problems.total()


if __name__ == "__main__":
    sys.exit(main() > 0)
