"""The server answers what predict finds, refuses bad uploads with a reason, and lives on under load."""

import http.client
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import write_detector
from PIL import Image

from dat.detection import serve
from dat.detection.evaluation import to_results
from dat.detection.predictor import load_predictor
from dat.utils.errors import CheckpointError, ConfigError

pytest.importorskip("uvicorn", reason="the extra 'serve'")
app = pytest.importorskip("dat.detection.app", reason="the extra 'serve'")
serving = pytest.importorskip("serving", reason="the extra 'serve'").serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    path = write_detector(tmp_path_factory.mktemp("detector") / "best.pth", box_refine=True)
    return load_predictor(path, torch.device("cpu"))


@pytest.fixture(scope="module")
def port(predictor):
    with serving(predictor, app.Limits(upload=200_000, pixels=500 * 500, waiting=64, seconds=1.0)) as port:
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


def picture(seed, size=(120, 90)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def encode(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF"])
def test_the_answer_is_what_predict_finds(port, predictor, form):
    image = picture(0).quantize(64).convert("RGB")
    results = to_results(0, (90, 120), predictor([image])[0], predictor.categories)
    least = results[5]["score"]
    status, answer = detect(port, encode(image, form), f"?threshold={least}")
    assert status == 200
    assert (answer["width"], answer["height"]) == (120, 90)
    wanted = [(r["category_id"], r["score"], r["bbox"]) for r in results if r["score"] >= least]
    assert [(d["category_id"], d["score"], d["bbox"]) for d in answer["detections"]] == wanted
    assert {d["category"] for d in answer["detections"]} <= {"blue", "red"}
    assert answer["detections"][0]["points"] is None


def test_points_of_each_detection(port):
    status, answer = detect(port, encode(picture(0)), "?points=true")
    assert status == 200
    found = answer["detections"][0]
    # levels, heads times points, x y weight
    assert np.shape(found["points"]) == (4, 2 * 4, 3)
    assert sum(weight for level in found["points"] for *_, weight in level) == pytest.approx(2, abs=0.01)
    assert len(found["reference"]) == 2


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
    "text": (b"hello", 415, "not a picture of a type that is read: JPEG, PNG"),
    "tiff": (encode(picture(0), "TIFF"), 415, "not a picture of a type"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not a picture of a type"),
    "truncated": (encode(picture(0, (200, 200)), "JPEG")[:-200], 400, "cannot be read as an image"),
    "truncated-png": (encode(picture(0, (200, 200)))[:-100], 400, "cannot be read as an image"),
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
    assert detect(port, encode(picture(1)))[0] == 200


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
    status, answer = detect(port, encode(picture(0)), query)
    assert status == 422
    assert answer["detail"][0]["loc"][1] == query[1:].split("=")[0]


def test_200_concurrent_requests_are_all_answered_and_none_is_mixed_up(predictor):
    images = [picture(seed, (120 + 10 * (seed % 3), 90)) for seed in range(6)]
    wanted = [to_results(0, (i.height, i.width), predictor([i])[0], predictor.categories) for i in images]
    bodies = [encode(image) for image in images]
    together = threading.Barrier(200)

    def ask(i):
        together.wait(60)
        return detect(port, bodies[i % 6])

    with serving(predictor, app.Limits(waiting=200)) as port, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    for i, (status, answer) in enumerate(answers):
        assert status == 200
        assert [d["bbox"] for d in answer["detections"]] == [r["bbox"] for r in wanted[i % 6]]


def test_more_requests_than_may_wait_are_told_to_come_back(predictor):
    held = threading.Event()

    def slow(images, sizes):
        held.wait(20)
        return predictor.run(images, sizes)

    waiting = replace(predictor, run=slow, detector=None)
    with serving(waiting, app.Limits(waiting=2)) as port, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(detect, port, encode(picture(0))) for _ in range(8)]
        while sum(answer.done() for answer in answers) < 6:
            time.sleep(0.01)
        held.set()
        found = sorted(answer.result()[0] for answer in answers)
    assert found == [200, 200, *[429] * 6]


def test_a_model_that_fails_is_said_and_the_server_lives_on(predictor):
    def fail_at_once(images, sizes):
        if images.shape[-1] > images.shape[-2]:
            raise CheckpointError("best.pth: its model cannot be used")
        return predictor.run(images, sizes)

    failing = replace(predictor, run=fail_at_once, detector=None)
    with serving(failing, app.Limits()) as port:
        assert detect(port, encode(picture(0))) == (500, {"detail": "best.pth: its model cannot be used"})
        assert detect(port, encode(picture(0, (80, 160))))[0] == 200


def test_the_page_and_the_description(port):
    status, page = request(port, "GET", "/")
    assert status == 200
    # nothing is fetched from elsewhere
    assert b"http" not in page.replace(b"http-equiv", b"")
    status, text = request(port, "GET", "/openapi.json")
    detect_path = json.loads(text)["paths"]["/detect"]["post"]
    assert set(detect_path["requestBody"]["content"]) == set(app.FORMATS.values())
    assert {"200", "400", "408", "413", "415", "422", "429", "500"} == set(detect_path["responses"])
    model = json.loads(request(port, "GET", "/model")[1])
    assert model == {"classes": ["blue", "red"], "points": True, "max_bytes": 200_000, "max_pixels": 250_000}


def test_the_command_listens_at_this_machine_alone(tmp_path):
    path = write_detector(tmp_path / "best.pth")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "detection.serve", str(path), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}: {path}, 2 classes\n"
        for _ in range(500):
            try:
                assert request(port, "GET", "/model")[0] == 200
                break
            except ConnectionError:
                time.sleep(0.02)
        else:
            pytest.fail("does not answer")
    finally:
        process.terminate()
        process.wait(20)


def test_limits_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="--max-waiting is 0, should be above 0"):
        serve.main([str(tmp_path / "best.pth"), "--max-waiting", "0"])
