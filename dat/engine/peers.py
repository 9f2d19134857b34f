"""When one process of a job fails, the others end too, with its error.

A process that waits in a collective does not notice that another one failed: NCCL waits for minutes, and no signal
handler of Python runs meanwhile. Here each process keeps a connection to process 0, which passes on what went wrong.
The kernel closes the connection of a process that is killed, so that is noticed as well.
"""

import json
import os
import secrets
import socket
import sys
import threading
from typing import Any

import torch

# seconds that a process has to end by itself, once it knows that another one failed
GRACE = 5.0

# seconds in which the reason for a failed collective arrives
REASON = 3.0


class PeerWatch:
    """This process's connections, and the first failure of another process.

    Args:
        rank: of this process.
        links: process 0: sockets to all the others by their rank; the others: one, to process 0.
        grace: seconds until this process is ended after another one failed.
    """

    def __init__(self, rank: int, links: dict[int, socket.socket], grace: float = GRACE):
        self.rank, self.links, self.grace = rank, links, grace
        self.error: str | None = None
        self._noticed = threading.Event()
        self._lock = threading.Lock()
        self._closed = False
        for peer, link in links.items():
            threading.Thread(target=self._listen, args=(peer, link), daemon=True).start()

    def reason(self, seconds: float = REASON) -> str | None:
        """The failure of another process, for which it waits so long; None if there is none."""
        self._noticed.wait(seconds)
        return self.error

    def failed(self, error: str) -> None:
        """Tells the other processes that this one fails."""
        self._close({"error": f"process {self.rank} on {socket.gethostname()} failed: {error}"})

    def done(self) -> None:
        """Tells the other processes that this one ends as it should."""
        self._close({"done": True})

    def _close(self, message: dict[str, Any]) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._send(message)

    def _send(self, message: dict[str, Any], but: int | None = None) -> None:
        for peer, link in self.links.items():
            if peer != but:
                try:
                    link.sendall(json.dumps(message).encode() + b"\n")
                # it has ended already
                except OSError:
                    continue

    def _listen(self, peer: int, link: socket.socket) -> None:
        """Waits for what a peer says; the end of the connection without a word means that it was killed."""
        try:
            line = link.makefile("rb").readline()
        except OSError:
            line = b""
        message = (
            json.loads(line) if line.endswith(b"\n") else {"error": f"process {peer} was killed, or its machine failed"}
        )
        with self._lock:
            if self._closed or "done" in message or self.error is not None:
                return
            self.error = message["error"]
        if self.rank == 0:
            self._send(message, but=peer)
        self._noticed.set()
        # the main thread may be waiting in a collective for ever
        threading.Event().wait(self.grace)
        with self._lock:
            if self._closed:
                return
            self._closed = True
        print(f"error: {self.error}", file=sys.stderr, flush=True)
        os._exit(1)


_watch: PeerWatch | None = None


def current_watch() -> PeerWatch | None:
    """The watch of this process; None where there is one process only."""
    return _watch


def start_watch(rank: int, world_size: int, device: torch.device) -> None:
    """Connects the processes of the initialised process group. Every process has to call it.

    Where process 0 cannot be reached within ten seconds, at MASTER_ADDR, that process goes without, and says so.
    """
    global _watch
    place: list[Any] = [None]
    server = None
    if rank == 0:
        server = socket.create_server(("", 0), backlog=world_size)
        server.settimeout(10)
        place = [(server.getsockname()[1], secrets.token_hex(16))]
    torch.distributed.broadcast_object_list(place, device=device)
    port, token = place[0]
    try:
        if server is not None:
            with server:
                links = _accept(server, world_size, token)
        else:
            link = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), timeout=10)
            link.sendall(f"{token} {rank}\n".encode())
            links = {0: link}
    except OSError as error:
        print(f"warning: process {rank} does not watch the others: {error}", file=sys.stderr)
        return
    for link in links.values():
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _watch = PeerWatch(rank, links)


def _accept(server: socket.socket, world_size: int, token: str) -> dict[int, socket.socket]:
    """The connections of all other processes, by rank; strangers are sent away."""
    links: dict[int, socket.socket] = {}
    while len(links) < world_size - 1:
        try:
            link, _ = server.accept()
        except TimeoutError:
            lacking = sorted(set(range(1, world_size)) - set(links))
            print(f"warning: processes {lacking} are not watched, they did not connect", file=sys.stderr)
            break
        link.settimeout(10)
        words = link.makefile("rb").readline().decode("ascii", "replace").split()
        if len(words) == 2 and words[0] == token:
            links[int(words[1])] = link
        else:
            link.close()
    return links
