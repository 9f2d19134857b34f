"""The server under hostile clients and files: others are answered, and no page of another site may use it."""

import copy
import http.client
import io
import json
import multiprocessing
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from exporting import write_detector
from PIL import Image

from dat.cli import parse
from dat.detection import Detector, commands
from dat.utils.errors import ConfigError

pytest.importorskip("uvicorn", reason="the extra 'serve'")
app = pytest.importorskip("dat.detection.app", reason="the extra 'serve'")
upload = pytest.importorskip("dat.detection.upload", reason="the extra 'serve'")
serving = pytest.importorskip("serving", reason="the extra 'serve'").serving


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.from_checkpoint(write_detector(tmp_path_factory.mktemp("detector") / "best.pth"), device="cpu")


@pytest.fixture(scope="module")
def port(detector):
    with serving(detector, app.Limits(), hosts=("cameras.example",), token="secret") as port:
        yield port


def encode(width=120, height=90):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def connect(port, body=b"", method="POST", path="/detect", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.title(): value for name, value in headers.items()})
    return connection


def ask(port, *arguments, **headers):
    """The status of an answer, its headers, and its body."""
    response = connect(port, *arguments, **headers).getresponse()
    return response.status, response.headers, response.read()


def test_an_image_that_takes_too_long_costs_one_process():
    pool = upload.DecodePool(1, upload.DecodeLimits(9000 * 9000, 0.1))
    slow = encode(9000, 9000)
    pool.start()
    try:
        for _ in range(2):
            with pytest.raises(upload.Refused, match=r"decoding the image takes more than 0.1 seconds") as refused:
                pool.decode(slow)
            assert refused.value.status == 413
            assert pool.decode(encode()).size == (120, 90)
    finally:
        pool.close()
    with pytest.raises(upload.Refused, match="the server is stopping"):
        pool.decode(encode())


def test_pixels_of_the_process_are_those_of_the_file():
    pool = upload.DecodePool(1, upload.DecodeLimits(10**6, 10))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    pool.start()
    try:
        assert np.array_equal(np.asarray(pool.decode(file.getvalue())), pixels)
    finally:
        pool.close()


def test_images_that_wait_while_processes_only_start_are_refused_when_the_pool_closes(monkeypatch):
    pool, begun, held = upload.DecodePool(2, upload.DecodeLimits(10**6, 10)), threading.Event(), threading.Event()
    monkeypatch.setattr(upload._Worker, "start", lambda worker: begun.set() or held.wait(20))
    pool.start()
    assert begun.wait(20)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(pool.decode, encode()) for _ in range(2)]
        time.sleep(0.1)
        assert not any(answer.done() for answer in answers)
        monkeypatch.undo()
        pool.close()
        for answer in answers:
            assert answer.exception(10).status == 503
            assert str(answer.exception(10)) == "the server is stopping"
    held.set()


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError()])
def test_an_image_that_no_process_starts_for_may_come_again(monkeypatch, error):
    pool = upload.DecodePool(1, upload.DecodeLimits(10**6, 10))

    def fail(process):
        raise error

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fail)
    pool.start()
    try:
        with pytest.raises(upload.Refused, match=r"no process starts to decode the image, try again later") as refused:
            pool.decode(encode())
        assert refused.value.status == 503
        monkeypatch.undo()
        assert pool.decode(encode()).size == (120, 90)
    finally:
        pool.close()


def allocate():
    upload._limit_memory(2**26)
    bytearray(2**24)
    try:
        bytearray(2**27)
    except MemoryError:
        sys.exit(7)


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_the_memory_of_a_process_is_limited():
    process = multiprocessing.get_context("forkserver").Process(target=allocate)
    process.start()
    process.join(60)
    assert process.exitcode == 7


def test_bytes_that_wait_are_limited_and_clients_that_leave_give_theirs_back(detector):
    held, begun = threading.Event(), threading.Event()
    slow = copy.copy(detector)

    def run(images, sizes):
        begun.set()
        held.wait(20)
        return detector.run(images, sizes)

    slow.run = run
    image = encode()
    # Bytes after the end of a PNG are not read.
    body = image + bytes(100_000 - len(image))
    with serving(slow, app.Limits(held=250_000)) as port:
        clients = [connect(port, body) for _ in range(2)]
        assert begun.wait(20)
        status, headers, reason = ask(port, body)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert "bytes are waiting" in json.loads(reason)["detail"]
        for client in clients:
            client.close()
        # The server learns of it within moments, and then takes others while the model is still busy.
        time.sleep(0.5)
        clients = [connect(port, body) for _ in range(2)]
        time.sleep(0.2)
        held.set()
        assert [client.getresponse().status for client in clients] == [200, 200]


def test_an_upload_that_is_cut_off_is_no_error_of_the_server(detector, capfd):
    with serving(detector, app.Limits()) as port:
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.putrequest("POST", "/detect")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(b"\x89PNG")
            time.sleep(0.05)
            connection.close()
        assert ask(port, encode())[0] == 200
    assert capfd.readouterr().err == ""


def test_what_is_no_http_is_one_line_of_the_log_at_most(detector, capfd):
    with serving(detector, app.Limits()) as port:
        for request in (
            "POST /detect HTTP/1.1\r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            "POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            "GET /model HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            "hello\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), 30) as connection:
                connection.sendall(request.encode())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            assert ask(port, encode())[0] == 200
            assert len(capfd.readouterr().err.splitlines()) <= 1, request


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "192.168.0.7", "Cameras.example:80"])
def test_addresses_and_known_hosts_are_served(port, host):
    assert ask(port, b"", "GET", "/", host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "[x]", ""])
def test_names_of_other_sites_that_lead_here_are_refused(port, host):
    status, _, reason = ask(port, b"", "GET", "/", host=host)
    assert status == 403
    assert "--allow-host" in json.loads(reason)["detail"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:8001", "http://localhost:80.evil.example"]
)
def test_pages_of_other_sites_may_not_post(port, origin):
    status, _, reason = ask(port, encode(), host="localhost:80", origin=origin, authorization="Bearer secret")
    assert status == 403
    assert "may not use this server" in json.loads(reason)["detail"]
    assert (
        ask(port, encode(), host="localhost:80", origin="http://localhost:80", authorization="Bearer secret")[0] == 200
    )


@pytest.mark.parametrize("given", [{}, {"authorization": "secret"}, {"authorization": "Bearer secre"}])
def test_a_token_is_asked_for(port, given):
    for method, path in (("POST", "/detect"), ("GET", "/model")):
        status, headers, reason = ask(port, encode(), method, path, **given)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "token is absent or wrong" in json.loads(reason)["detail"]
    assert ask(port, b"", "GET", "/model", authorization="Bearer secret")[0] == 200


def test_every_answer_tells_browsers_to_be_careful(port):
    for path, status in (("/", 200), ("/model", 401), ("/nothing", 401)):
        found, headers, _ = ask(port, b"", "GET", path)
        assert found == status
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


def test_requests_of_a_client_are_limited_per_second(detector):
    with serving(detector, app.Limits(rate=2)) as port:
        found = [ask(port, b"", "GET", "/model") for _ in range(8)]
        assert [status for status, *_ in found[:4]] == [200] * 4
        assert found[-1][0] == 429
        assert found[-1][1]["Retry-After"] == "1"
        time.sleep(1.1)
        assert ask(port, b"", "GET", "/model")[0] == 200


def test_hosts_and_tokens_that_cannot_work_are_refused_at_once(detector, monkeypatch):
    with pytest.raises(ConfigError, match="is no name or address"):
        app.serve(detector, "a\udcff", 0, app.Limits())
    monkeypatch.setattr(commands.Detector, "from_checkpoint", lambda *arguments: detector)
    for token in ("", "s\u00e9cret", "two words"):
        with pytest.raises(ConfigError, match=r"the token .* should be letters, digits and signs of ASCII"):
            commands.serve(parse(["detect", "serve", "best.pth", "--port", "0", "--token", token])[1])


def test_serving_everybody_without_a_token_is_warned_of(detector, monkeypatch, caplog):
    monkeypatch.setattr("uvicorn.Server.run", lambda *arguments: None)
    app.serve(detector, "127.0.0.1", 0, app.Limits())
    app.serve(detector, "0.0.0.0", 0, app.Limits(), token="secret")
    assert caplog.text == ""
    app.serve(detector, "0.0.0.0", 0, app.Limits())
    assert "whoever reaches this machine may use the server; DAT_SERVE_TOKEN or --token" in caplog.text
