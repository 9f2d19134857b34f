"""The server answers what predict finds, refuses bad uploads with a reason, and lives on under load."""

import copy
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from commands import dat
from exporting import write_detector
from PIL import Image

from dat.detection import Detector
from dat.utils.errors import CheckpointError

pytest.importorskip("uvicorn", reason="the extra 'serve'")
app = pytest.importorskip("dat.detection.app", reason="the extra 'serve'")
serving = pytest.importorskip("serving", reason="the extra 'serve'").serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = write_detector(tmp_path_factory.mktemp("detector") / "best.pth", box_refine=True)
    return Detector.from_checkpoint(path, device="cpu")


@pytest.fixture(scope="module")
def port(detector):
    with serving(detector, app.Limits(upload=200_000, pixels=500 * 500, waiting=64, seconds=1.0)) as port:
        yield port


def request(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def detect(port, body, query=""):
    status, answer = request(port, "POST", f"/detect{query}", body)
    return status, json.loads(answer)


def draw_image(seed, size=(120, 90)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def encode(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def with_run(detector, run):
    """The detector with another function in the place of its model."""
    other = copy.copy(detector)
    other.run = run
    return other


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF"])
def test_the_answer_is_what_predict_finds(port, detector, form):
    image = draw_image(0).quantize(64).convert("RGB")
    results = detector.predict(image, threshold=0).to_coco()
    least = results[5]["score"]
    status, answer = detect(port, encode(image, form), f"?threshold={least}")
    assert status == 200
    assert (answer["width"], answer["height"]) == (120, 90)
    assert len(results) > 6
    wanted = [(r["category_id"], r["score"], r["bbox"]) for r in results if r["score"] >= least]
    assert [(d["category_id"], d["score"], d["bbox"]) for d in answer["detections"]] == wanted
    assert {d["category"] for d in answer["detections"]} <= {"blue", "red"}
    assert answer["detections"][0]["points"] is None


def test_points_of_each_detection(port):
    status, answer = detect(port, encode(draw_image(0)), "?points=true")
    assert status == 200
    found = answer["detections"][0]
    # levels, heads times points, x y weight
    assert np.shape(found["points"]) == (4, 2 * 4, 3)
    assert sum(weight for level in found["points"] for *_, weight in level) == pytest.approx(2, abs=0.01)
    assert len(found["reference"]) == 2


def test_images_are_searched_in_tiles(detector):
    other = copy.copy(detector)
    other.val = detector.options(tiles=60)
    with serving(other, app.Limits()) as port:
        status, answer = detect(port, encode(draw_image(0)))
        found = detector.predict(draw_image(0), threshold=0, tiles=60)
        assert (status, len(answer["detections"])) == (200, len(found))
        assert json.loads(request(port, "GET", "/model")[1])["points"] is False
        assert "searches tiles" in detect(port, encode(draw_image(0)), "?points=true")[1]["detail"]


def bomb(side):
    """A PNG that says that it has side x side pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


BAD = {
    "empty": (b"", 400, "the body is empty"),
    "form": (
        b'--ab\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n',
        415,
        "the body is a form, should be the image file alone, as curl --data-binary @photo.jpg sends it",
    ),
    "text": (b"hello", 415, "not an image of a supported format: JPEG, PNG"),
    "tiff": (encode(draw_image(0), "TIFF"), 415, "not an image of a supported format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image of a supported format"),
    "truncated": (encode(draw_image(0, (200, 200)), "JPEG")[:-200], 400, "cannot be read as an image"),
    "truncated-png": (encode(draw_image(0, (200, 200)))[:-100], 400, "cannot be read as an image"),
    "pixels": (encode(Image.new("RGB", (501, 500))), 413, "501 x 500 pixels, more than 250000"),
    "bomb": (bomb(20_000), 413, "pixels"),
    "larger-bomb": (bomb(60_000), 413, "pixels"),
    "bytes": (b"\0" * 200_001, 413, "more than 200000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads_are_refused_and_the_server_lives_on(port, name):
    body, status, reason = BAD[name]
    found, answer = detect(port, body)
    assert found == status
    assert reason in answer["detail"]
    assert detect(port, encode(draw_image(1)))[0] == 200


def test_an_upload_without_a_length_is_cut_off(port):
    def chunks():
        for _ in range(300):
            yield b"\0" * 1000

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/detect", chunks(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 413


def test_an_upload_that_stalls_is_given_up(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/detect")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"\x89PNG")
    response = connection.getresponse()
    assert response.status == 408
    assert "more than 1 seconds" in json.loads(response.read())["detail"]


@pytest.mark.parametrize("query", ["?threshold=2", "?threshold=x", "?points=perhaps"])
def test_wrong_arguments_are_refused(port, query):
    status, answer = detect(port, encode(draw_image(0)), query)
    assert status == 422
    assert answer["detail"][0]["loc"][1] == query[1:].split("=")[0]


def test_200_concurrent_requests_are_all_answered_and_none_is_mixed_up(detector):
    images = [draw_image(seed, (120 + 10 * (seed % 3), 90)) for seed in range(6)]
    wanted = [detector.predict(image, threshold=0).to_coco() for image in images]
    bodies = [encode(image) for image in images]
    together = threading.Barrier(200)

    def ask(i):
        together.wait(60)
        return detect(port, bodies[i % 6])

    with serving(detector, app.Limits(waiting=200)) as port, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    for i, (status, answer) in enumerate(answers):
        assert status == 200
        assert [d["bbox"] for d in answer["detections"]] == [r["bbox"] for r in wanted[i % 6]]


def test_more_requests_than_may_wait_are_told_to_come_back(detector):
    held = threading.Event()

    def slow(images, sizes):
        held.wait(20)
        return detector.run(images, sizes)

    with serving(with_run(detector, slow), app.Limits(waiting=2)) as port, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(detect, port, encode(draw_image(0))) for _ in range(8)]
        while sum(answer.done() for answer in answers) < 6:
            time.sleep(0.01)
        held.set()
        found = sorted(answer.result()[0] for answer in answers)
    assert found == [200, 200, *[429] * 6]


def test_a_model_that_fails_is_said_and_the_server_lives_on(detector):
    def fail_at_once(images, sizes):
        if images.shape[-1] > images.shape[-2]:
            raise CheckpointError("best.pth: its model cannot be used")
        return detector.run(images, sizes)

    with serving(with_run(detector, fail_at_once), app.Limits()) as port:
        assert detect(port, encode(draw_image(0))) == (500, {"detail": "best.pth: its model cannot be used"})
        assert detect(port, encode(draw_image(0, (80, 160))))[0] == 200


def test_the_page_and_the_description(port):
    status, page = request(port, "GET", "/")
    assert status == 200
    # nothing is fetched from elsewhere
    assert b"http" not in page.replace(b"http-equiv", b"")
    status, text = request(port, "GET", "/openapi.json")
    detect_path = json.loads(text)["paths"]["/detect"]["post"]
    assert set(detect_path["requestBody"]["content"]) == set(app.FORMATS.values())
    statuses = {"200", "400", "401", "403", "408", "413", "415", "422", "429", "500", "503"}
    assert set(detect_path["responses"]) == statuses
    model = json.loads(request(port, "GET", "/model")[1])
    assert model == {"classes": ["blue", "red"], "points": True, "max_bytes": 200_000, "max_pixels": 250_000}


def test_the_command_prints_its_address_once_it_listens(tmp_path):
    path = write_detector(tmp_path / "best.pth")
    command = [sys.executable, "-m", "detection.serve", str(path), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address, text = process.stdout.readline().split(": ")
        assert text == f"{path}, 2 classes\n"
        assert address.startswith("http://127.0.0.1:")
        port = int(address.rpartition(":")[2])
        assert request(port, "GET", "/model")[0] == 200
        # An upload that stalls does not keep the server from ending.
        with socket.create_connection(("127.0.0.1", port)) as stalled:
            stalled.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nGIF")
            time.sleep(0.2)
            process.terminate()
            process.wait(10)
    finally:
        process.kill()


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_the_command_ends_soon_while_its_processes_only_start(tmp_path, signals):
    """The signals go to all processes, as those of a terminal and of systemd do."""
    path = write_detector(tmp_path / "best.pth")
    command = [sys.executable, "-m", "detection.serve", str(path), "--port", "0", "--device", "cpu"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    try:
        port = int(process.stdout.readline().split(": ")[0].rpartition(":")[2])
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(detect, port, encode(draw_image(0))) for _ in range(6)]
            time.sleep(0.3)
            for number in signals:
                os.killpg(process.pid, number)
                time.sleep(0.3)
            # Where the processes start within the seconds that requests have to end, these are answered.
            for answer in answers:
                assert answer.result()[0] in (200, 503)
        process.wait(20)
    finally:
        process.kill()
        # What is left of the processes has ended when nobody writes any more.
        process.stdout.read()
    lines = (tmp_path / "errors").read_text().splitlines()
    assert [line for line in lines if not re.search(r"Cancel \d running task", line)] == []


def test_a_port_in_use_is_named(detector, port):
    with pytest.raises(OSError, match="in use"):
        app.serve(detector, "127.0.0.1", port, app.Limits())


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [("--max-waiting", 0, "an integer of at least 1"), ("--max-megabytes", "inf", "a number")],
)
def test_limits_are_checked(tmp_path, capsys, argument, value, kind):
    with pytest.raises(SystemExit):
        dat("detect", "serve", tmp_path / "best.pth", argument, value)
    assert f"argument {argument}: is {value}, should be {kind}" in capsys.readouterr().err
