"""A detector's server in a thread."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from dat.detection.app import create_app, server_config


@contextmanager
def serving(detector, limits, **options):
    """The port of a server that runs in a thread; `options` of create_app."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(server_config(create_app(detector, limits, **options)))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
