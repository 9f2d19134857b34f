"""Images, videos, tables and sampling points of `dat detect predict`, of checkpoints and of exported models."""

import csv
import errno
import json
import os
import sys

import numpy as np
import pytest
import torch
from commands import dat
from exporting import write_detector
from PIL import Image

from dat.detection import Detector
from dat.detection.points import detect_with_points
from dat.engine.checkpoint import load_checkpoint, save_checkpoint
from dat.utils.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:# The axis name")
EVERYTHING = ["--device", "cpu", "--threshold", "0"]


def noise(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("detector") / "best.pth", box_refine=True)


@pytest.fixture
def folder(tmp_path):
    """Two sizes of images, in two folders."""
    (tmp_path / "in/b").mkdir(parents=True)
    for i, (name, size) in enumerate((("1.png", (120, 90)), ("2.png", (120, 90)), ("b/3.png", (80, 130)))):
        noise(size, i).save(tmp_path / "in" / name)
    return tmp_path / "in"


def run(checkpoint, *arguments):
    dat("detect", "predict", checkpoint, *arguments, *EVERYTHING)


def read(out):
    return json.loads((out / "detections.json").read_text())


def test_batches_do_not_change_results(checkpoint, folder, tmp_path):
    for size in (1, 8):
        run(checkpoint, folder, "--out", tmp_path / str(size), "--batch-size", size)
    one, eight = (read(tmp_path / size) for size in "18")
    assert [r["file_name"] for r in one] == [r["file_name"] for r in eight]
    np.testing.assert_allclose([r["score"] for r in one], [r["score"] for r in eight], atol=2e-5)


def test_the_table_says_what_the_json_says(checkpoint, folder, tmp_path):
    run(checkpoint, folder, "--out", tmp_path / "out")
    with (tmp_path / "out/detections.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    results = read(tmp_path / "out")
    assert len(rows) == len(results)
    for row, result in zip(rows, results, strict=True):
        assert [float(row[name]) for name in ("x", "y", "width", "height")] == result["bbox"]
        assert row["label"] == {3: "blue", 11: "red"}[result["category_id"]]
        assert (row["file_name"], row["frame"]) == (result["file_name"], "")


def test_classes_and_crops(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, folder / "b", "--out", out, "--classes", "red", "--crops")
    results = read(out)
    assert {result["category_id"] for result in results} == {11}
    assert f"{len(results)} detections with a score of at least 0.0 in 1 images" in capsys.readouterr().out
    assert [path.name for path in (out / "crops").iterdir()] == ["red"]
    for i, result in enumerate(results, 1):
        with Image.open(out / f"crops/red/3_{i}.png") as crop:
            assert crop.width == pytest.approx(max(result["bbox"][2], 1), abs=1.6)
            assert crop.height == pytest.approx(max(result["bbox"][3], 1), abs=1.6)
    with pytest.raises(ConfigError, match="--classes: no class 'green', there are blue, red"):
        run(checkpoint, folder, "--out", out, "--classes", "green")


@pytest.mark.parametrize("failing", ["a.png", "crops/red/a_1.png"])
def test_a_full_disk_is_said_with_the_file_and_leaves_no_half_of_it(checkpoint, tmp_path, monkeypatch, failing):
    (tmp_path / "in").mkdir()
    noise((64, 64)).save(tmp_path / "in/a.png")
    out, save = tmp_path / "out", Image.Image.save

    def save_on_full_disk(image, path):
        if path.parent == (out / failing).parent:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", save_on_full_disk)
    with pytest.raises(OSError, match="MiB are free") as error:
        run(checkpoint, tmp_path / "in", "--out", out, "--classes", "red", "--crops")
    assert error.value.filename == str(out / failing)
    assert list((out / failing).parent.glob("*a*")) == []


def test_names_that_look_alike_lose_no_crop_and_no_points(checkpoint, tmp_path):
    (tmp_path / "in/cam").mkdir(parents=True)
    names = ["cam/1.png", "cam_1.png", "a.png", "a_points.png"]
    for i, name in enumerate(names):
        noise((64, 64), i).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    run(checkpoint, tmp_path / "in", "--out", out, "--crops", "--show-points", "--top-k", 2)
    assert len(list(out.rglob("crops/*/*.png"))) == len(read(out))
    pictures = [path for path in out.rglob("*.png") if "crops" not in path.parts]
    assert len(pictures) == 2 * len(names)
    with Image.open(out / "a_points.png") as annotated, Image.open(out / "a.png") as other:
        assert annotated.size == other.size


def test_names_that_differ_in_case_are_different_pictures_on_any_file_system(checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("IMG.bmp", "img.png"):
        noise((64, 64), 0).save(tmp_path / "in" / name)
    run(checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"IMG.bmp.png", "img.png.png"}


def test_the_last_line_counts_what_was_left_out(checkpoint, folder, tmp_path, capsys):
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "notes.txt").write_text("notes")
    (folder / "b/3.png").rename(folder / "b/3")
    run(checkpoint, folder, "--out", tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("3 images, 2 left out: 1 of no image format: notes.txt; 1 of 1x1 pixels (too small): dot.png")
    assert {result["file_name"] for result in read(tmp_path / "out")} == {"1.png", "2.png", "b/3"}


def test_patterns_and_several_sources_are_named_from_their_common_folder(checkpoint, folder, tmp_path):
    run(checkpoint, folder / "b", f"{folder}/[12].png", folder / "1.png", "--out", tmp_path / "out")
    names = dict.fromkeys(result["file_name"] for result in read(tmp_path / "out"))
    assert list(names) == ["b/3.png", "1.png", "2.png"]
    with pytest.raises(DataError, match="no file matches this pattern"):
        run(checkpoint, f"{folder}/no*.png", "--out", tmp_path / "out")


def write_video(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_image(noise((96, 64), number))))
        container.mux(stream.encode())


def test_frames_of_a_video(checkpoint, folder, tmp_path):
    pytest.importorskip("av", reason="the extra 'video'")
    write_video(folder / "clip.mp4")
    out = tmp_path / "out"
    run(checkpoint, folder, "--out", out, "--every", "2")
    frames = {(r["image_id"], r["frame"]) for r in read(out) if r["file_name"] == "clip.mp4"}
    assert {frame for _, frame in frames} == {0, 2, 4}
    assert len({image for image, _ in frames}) == 3
    assert sorted(path.name for path in (out / "clip.mp4").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    assert {r["frame"] for r in read(out) if "frame" in r} == {0, 2, 4}


def test_without_a_reader_videos_say_what_to_install(checkpoint, folder, tmp_path, monkeypatch):
    (folder / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r'needs PyAV: pip install "dat-vision\[video\]"'):
        run(checkpoint, folder / "clip.mp4", "--out", tmp_path / "out")


@pytest.mark.parametrize("kind", ["deformable_detr", "dino"])
def test_points_are_those_that_the_last_layer_sampled(kind, tmp_path, monkeypatch):
    """Reference, offsets and logits are taken from the op's own arguments; images are padded."""
    from dat.layers import ms_deform_attn as layer

    path = write_detector(tmp_path / "best.pth", decoder_depth=2, num_levels=3, kind=kind)
    state = load_checkpoint(path)
    state["config"]["data"]["pad_multiple"] = 32
    save_checkpoint(path, state)
    detector, calls = Detector.from_checkpoint(path, device="cpu"), []
    op = layer.ms_deform_attn
    monkeypatch.setattr(layer, "ms_deform_attn", lambda *args: calls.append(args) or op(*args))
    image = noise((200, 120))
    found, points = detect_with_points(detector, image)
    _, shapes, reference, offsets, logits = calls[-1]
    sizes = torch.tensor([(w, h) for h, w in shapes])
    assert detector.input_size(image) == (64, 107)
    # it is the corner of an input of 64 x 128
    scale = torch.tensor([128 * 200 / 107, 64 * 120 / 64])
    reference = reference[0, :, None, :, None]
    # With boxes as references, the four points are in fractions of half their sides.
    steps = offsets[0] / sizes[:, None] if reference.shape[-1] == 2 else offsets[0] / 4 * reference[..., 2:] / 2
    locations = (reference[..., :2] + steps) * scale
    torch.testing.assert_close(points.locations, locations[found.queries])
    weights = logits[0].flatten(2).softmax(-1).view_as(logits[0])
    torch.testing.assert_close(points.weights, weights[found.queries])
    torch.testing.assert_close(points.weights.sum((2, 3)), torch.ones(len(points.weights), 2))
    torch.testing.assert_close(found.boxes, detector.predict(image, threshold=0).boxes)


def test_show_points_draws_a_sheet_beside_each_image(checkpoint, folder, tmp_path):
    run(checkpoint, folder / "b", "--out", tmp_path / "out", "--show-points")
    with Image.open(tmp_path / "out/3_points.png") as sheet:
        # a row for each of the twelve best, columns for all levels and for each of the four
        assert sheet.width == pytest.approx(5 * 2.3 * 130, rel=0.1)
        assert sheet.height > 4 * sheet.width / 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "argument --batch-size: is 0, should be an integer of at least 1"),
        (["--every", "x"], "argument --every: is x, should be an integer of at least 1"),
        (["--threshold", "2"], "argument --threshold: is 2, should be a number from 0.0 to 1.0"),
    ],
)
def test_mistakes_are_named(checkpoint, folder, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        dat("detect", "predict", checkpoint, folder, "--out", tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_points_need_a_deformable_detr(folder, tmp_path):
    path = write_detector(tmp_path / "detr.pth", kind="detr")
    with pytest.raises(ConfigError, match=r"detr.pth: sampling points need a deformable_detr"):
        run(path, folder, "--out", tmp_path / "out", "--show-points")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_is_refused(folder, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="not an ONNX model"):
        run(tmp_path / "model.onnx", folder, "--out", tmp_path / "out")


def test_hostile_names_of_files_are_written_and_shown_without_obeying_them(checkpoint, folder, tmp_path, capsys):
    names = [b"caf\xe9.png", b"=cmd().png", b"new\nline.png", b"esc\x1b[31m.png", "a\u202eb.png".encode(), b"<i>.png"]
    (tmp_path / "names").mkdir()
    for name in names:
        noise((64, 48)).save(tmp_path / "names" / os.fsdecode(name))
    (tmp_path / "names" / os.fsdecode(b"bad\xe9\x1b[2J.png")).write_bytes(b"x")
    run(checkpoint, tmp_path / "names", "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert r"bad\udce9\x1b[2J.png" in shown.encode().decode()
    assert {result["file_name"] for result in read(tmp_path / "out")} == set(map(os.fsdecode, names))
    with (tmp_path / "out/detections.csv").open(encoding="utf-8", newline="") as file:
        cells = {row["file_name"] for row in csv.DictReader(file)}
    wanted = {r"caf\udce9.png", "'=cmd().png", r"new\x0aline.png", r"esc\x1b[31m.png", r"a\u202eb.png", "<i>.png"}
    assert cells == {name.replace(r"\x0a", r"\n") for name in wanted}


def test_long_names_of_files_and_classes_lose_no_result(checkpoint, tmp_path):
    state = load_checkpoint(checkpoint)
    state["class_names"] = ["字" * 300, "x" * 900]
    save_checkpoint(tmp_path / "long.pth", state)
    deep = tmp_path / "in" / "/".join("abc" * 20 for _ in range(6))
    deep.mkdir(parents=True)
    for path in (tmp_path / "in" / f"{'x' * 246}.png", tmp_path / "in" / ("字" * 85), deep / "1.png"):
        noise((64, 48)).save(path, "PNG")
    out = tmp_path / "out"
    run(tmp_path / "long.pth", tmp_path / "in", "--out", out, "--crops", "--show-points", "--top-k", 1)
    assert len(list((out / "crops").glob("*"))) == len({result["category_id"] for result in read(out)})
    assert len(list((out / "crops").glob("*/*.png"))) == len(read(out)) == 3
    assert len(list(out.glob("*_points.png"))) == 2
    assert (out / deep.relative_to(tmp_path / "in") / "1_points.png").is_file()


def test_a_link_that_leads_to_itself_is_no_folder_of_results(checkpoint, folder, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"--out: \S+loop is a file or a broken link, should be a folder"):
        run(checkpoint, folder, "--out", tmp_path / "loop")
