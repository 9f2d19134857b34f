"""Files by anybody end in one clear error or are used: they run nothing, take no memory and do not crash.

`python -m tests.fuzz` damages many more.
"""

import json
import math
import random
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from dat.classification import Classifier
from dat.detection import Detector
from dat.detection.checkpoint import load_detector
from dat.engine.checkpoint import load_checkpoint, read_weights, save_checkpoint
from dat.export import runtime
from dat.export.runtime import load_exported
from dat.utils.errors import CheckpointError, ConfigError, DataError
from dat.utils.images import read_image
from dat.utils.media import Media, read_frames
from tests import fuzz
from tests.damage import damage
from tests.detection.exporting import write_detector

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture(scope="module")
def kinds(folder):
    return fuzz.make_kinds(folder)


@pytest.mark.parametrize(
    ("name", "count"),
    [("detector", 15), ("classifier", 12), ("visualized", 5), ("weights", 15), ("safetensors", 20), ("uploads", 20)],
)
def test_damaged_files_end_well(kinds, folder, name, count):
    kind = kinds[name]()
    path = folder / f"case{kind.suffix}"
    for seed in range(count):
        path.write_bytes(kind.case(seed))
        assert fuzz.fails(kind, path) is None, f"{name}, seed {seed}"


def test_the_same_seed_is_the_same_damage(kinds):
    kind = kinds["safetensors"]()
    assert [kind.case(seed) for seed in range(5)] == [kind.case(seed) for seed in range(5)]
    assert all(damage(kind.whole[0], random.Random(seed)) != kind.whole[0] for seed in range(5))


@pytest.fixture
def state(tmp_path):
    return load_checkpoint(write_detector(tmp_path / "whole.pth"))


def loads(tmp_path, state):
    save_checkpoint(tmp_path / "best.pth", state)
    return load_detector(tmp_path / "best.pth", CPU)


class Attack:
    """Pickled, it opens a file for writing when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt2", ".onnx"])
def test_pickles_are_never_run(tmp_path, suffix):
    path, owned = tmp_path / f"model{suffix}", tmp_path / "owned"
    torch.save({"format": 1, "kind": "detection", "state_dict": {"x": Attack(owned)}}, path)
    with pytest.raises((CheckpointError, ConfigError), match=f"model{suffix}"):
        Detector.from_checkpoint(path)
    with pytest.raises(CheckpointError, match=f"model{suffix}"):
        read_weights(path)
    assert not owned.exists()


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    whole, packed = write_detector(tmp_path / "whole.pth"), tmp_path / "packed.pth"
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w") as target:
        for name in archive.namelist():
            target.writestr(name, archive.read(name), zipfile.ZIP_DEFLATED)
    for read in (load_checkpoint, read_weights):
        with pytest.raises(CheckpointError, match=r"packed.pth: has compressed parts"):
            read(packed)


def endless():
    value = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


def circle():
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.backbone.x", endless, "nested without end"),
        ("model.backbone.x", circle, "nested without end"),
        ("model.backbone.x", lambda: 1 << 100, "a number of 101 bits"),
        ("output", lambda: "x" * 200_000, "a text of 200000 characters"),
        ("model.encoder_depth", lambda: 60_000, "of a much larger model than its weights"),
        ("model.backbone.layers", lambda: [60_000] * 4, "of a much larger model than its weights"),
        ("model.num_queries", lambda: 10**9, "model.num_queries is 1000000000, should be at most 100000"),
        ("model.num_queries", lambda: 60_000, r"query_embed.weight is \(7, .*\), should be \(60000"),
        ("model.mlp_dim", lambda: "y" * 5000, "model.mlp_dim is 'yyy.*yyy..., should be an integer"),
        ("model.backbone.name", lambda: "no_such", "model.backbone.name: no timm model"),
        ("data.val.size", lambda: 10**6, "data.val.size is 1000000, should be 1 to 4096"),
        ("data.pad_multiple", lambda: 10**6, "data.pad_multiple is 1000000, should be 1 to 4096"),
        ("data.std", lambda: [math.nan] * 3, "data.std is"),
        ("train.workers", lambda: 10**5, "train.workers is 100000, should be 0 to 256"),
    ],
)
def test_configurations_that_ask_for_too_much(tmp_path, state, place, value, message):
    section = state["config"]
    *parents, key = place.split(".")
    for name in parents:
        section = section[name]
    section[key] = value()
    with pytest.raises(CheckpointError, match=f"best.pth: .*{message}") as raised:
        loads(tmp_path, state)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("config"), "has no configuration"),
        (lambda s: s.pop("state_dict"), "holds a NoneType, should hold tensors by name"),
        (lambda s: s["state_dict"].update({"level_embed": [1.0]}), "level_embed is a list, should be a tensor"),
        (lambda s: s["state_dict"]["level_embed"].fill_(math.nan), r"level_embed \(4, 16\) holds NaN"),
        (
            lambda s: s["state_dict"].update(level_embed=torch.zeros(()).expand(10**6, 10**6)),
            "would take 40000\\d+ bytes",
        ),
        (lambda s: s["state_dict"].update(level_embed=torch.zeros(4, 16).to_sparse()), "should be a plain one"),
        (lambda s: s["class_names"].append("third"), "category_ids should be 3 different integers"),
        (lambda s: s.update(class_names=[]), "class_names should be a list of texts"),
    ],
)
def test_parts_that_are_missing_or_of_another_type(tmp_path, state, change, message):
    change(state)
    with pytest.raises(CheckpointError, match=f"best.pth: .*{message}"):
        loads(tmp_path, state)


def test_weights_whose_products_are_not_finite_are_an_error_of_their_file(tmp_path, state):
    for name in state["state_dict"]:
        if name.startswith("bbox_embed") and name.endswith("weight"):
            state["state_dict"][name][:, ::2], state["state_dict"][name][:, 1::2] = 3e38, -3e38
    save_checkpoint(tmp_path / "best.pth", state)
    detector = Detector.from_checkpoint(tmp_path / "best.pth", device="cpu")
    with pytest.raises(CheckpointError, match=r"best.pth: gives numbers that are NaN or infinite"):
        detector.predict(Image.new("RGB", (128, 64)))


METADATA = {"class_names": ["a"], "category_ids": [1], "size": 64, "max_size": 64, "img_size": 64, "crop_pct": 1.0}


def write_onnx(path, nodes, outputs, initializers=(), kind="detection"):
    """A model with the metadata of an export, of "images" and, a detector, "sizes"."""
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", 3, "h", "w"])]
    if kind == "detection":
        inputs.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, ["b", 2]))
    values = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs]
    graph = helper.make_graph(nodes, "graph", inputs, values, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    metadata = {"kind": kind, "crop_mode": "center", "interpolation": "bicubic", **METADATA}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    path.write_bytes(model.SerializeToString())
    return path


def constant(name, array):
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.asarray(array)))


@pytest.mark.parametrize(
    ("labels", "boxes", "message"),
    [
        ([[1]], [[[0.0] * 4]], "labels that are not 0 to 0"),
        ([[0.5]], [[[0.0] * 4]], "labels that are not 0 to 0"),
        ([[0]], [[[math.nan] * 4]], "NaN or infinite"),
        ([[0, 0]], [[[0.0] * 4]], r"gives \[1, 1\], \[1, 2\]"),
        ([[0]], [[0.0] * 4], r"should give \[B, k\]"),
        ([0], [[[0.0] * 4]], r"should give \[B, k\]"),
    ],
)
def test_onnx_files_whose_results_are_no_detections(tmp_path, labels, boxes, message):
    arrays = {"scores": np.ones((1, 1), np.float32), "labels": np.array(labels), "boxes": np.array(boxes, np.float32)}
    arrays["queries"] = np.zeros((1, 1), np.int64)
    kinds = [(name, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in arrays.items()]
    path = write_onnx(tmp_path / "model.onnx", [constant(name, array) for name, array in arrays.items()], kinds)
    with pytest.raises(CheckpointError, match=f"model.onnx: .*{message}"):
        Detector.from_checkpoint(path).predict(Image.new("RGB", (64, 64)))


def write_constants(path, scores, boxes):
    """A detector that gives the same detections for every image."""
    arrays = {"scores": np.array(scores), "labels": np.zeros((1, 1), np.int64), "boxes": np.array(boxes, np.float32)}
    arrays["queries"] = np.zeros((1, 1), np.int64)
    kinds = [(name, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in arrays.items()]
    return write_onnx(path, [constant(name, array) for name, array in arrays.items()], kinds)


@pytest.mark.parametrize(
    ("scores", "boxes", "message"),
    [
        (np.float32([[1.5]]), [[[0.0] * 4]], "scores that are not 0 to 1"),
        (np.float32([[-0.5]]), [[[0.0] * 4]], "scores that are not 0 to 1"),
        ([[1]], [[[0.0] * 4]], "scores that are not 0 to 1"),
        (np.float32([[0.5]]), [[[9.0, 0, 1, 5]]], "boxes whose right or bottom edge"),
        (np.float32([[math.inf]]), [[[0.0] * 4]], "NaN or infinite"),
    ],
)
def test_onnx_files_whose_scores_or_boxes_make_no_sense(tmp_path, scores, boxes, message):
    path = write_constants(tmp_path / "model.onnx", scores, boxes)
    with pytest.raises(CheckpointError, match=f"model.onnx: gives .*{message}"):
        Detector.from_checkpoint(path).predict(Image.new("RGB", (64, 64)))


def test_onnx_files_with_functions_are_refused_before_they_are_inlined(tmp_path, monkeypatch):
    path = write_constants(tmp_path / "model.onnx", np.float32([[0.5]]), [[[0.0] * 4]])
    model, opset = onnx.load(path), helper.make_opsetid("", 20)
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("f", "F", ["x"], ["y"], nodes, [opset]))
    onnx.save(model, path)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *arguments, **options: pytest.fail("it was loaded"))
    with pytest.raises(CheckpointError, match=r"model.onnx: defines 1 functions, which exports never do"):
        load_exported(path, "detection")


@pytest.mark.parametrize("rows", [0, 2])
def test_onnx_files_that_label_another_number_of_pictures(tmp_path, rows):
    arrays = {"logits": np.ones((rows, 1), np.float32)}
    kinds = [(name, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in arrays.items()]
    nodes = [constant(name, array) for name, array in arrays.items()]
    path = write_onnx(tmp_path / "model.onnx", nodes, kinds, kind="classification")
    with pytest.raises(CheckpointError, match=rf"model.onnx: gives logits \[{rows}, 1\], should be \[1, 1\]"):
        Classifier.from_checkpoint(path).predict(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("location", ["../secret.bin", "{}/secret.bin", "beside.bin", "/dev/zero"])
@pytest.mark.parametrize("in_node", [False, True])
def test_onnx_files_read_no_other_files(tmp_path, location, in_node):
    (tmp_path / "model").mkdir()
    for name in ("secret.bin", "model/beside.bin"):
        (tmp_path / name).write_bytes(bytes(16))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location.format(tmp_path))
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor)] if in_node else []
    nodes.append(helper.make_node("Identity", ["w"], ["scores"]))
    outputs = [("scores", TensorProto.FLOAT)]
    path = write_onnx(tmp_path / "model/model.onnx", nodes, outputs, [] if in_node else [tensor])
    with pytest.raises(CheckpointError, match=r"model.onnx: keeps 'w' in another file, which exports never do"):
        load_exported(path, "detection")


def test_onnx_files_with_sparse_tensors_are_not_unfolded(tmp_path):
    numbers = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(numbers, helper.make_tensor("i", TensorProto.INT64, [1], [0]), [5 * 10**8])
    nodes = [helper.make_node("Constant", [], ["scores"], sparse_value=sparse)]
    path = write_onnx(tmp_path / "model.onnx", nodes, [("scores", TensorProto.FLOAT)])
    with pytest.raises(CheckpointError, match=r"model.onnx: holds a sparse tensor"):
        load_exported(path, "detection")


@pytest.fixture
def little_memory(monkeypatch):
    """A MiB for onnxruntime."""
    monkeypatch.setattr(runtime, "MOST_MEMORY", 2**20)
    runtime._bound_memory.cache_clear()
    yield
    monkeypatch.undo()
    runtime._bound_memory.cache_clear()
    runtime._bound_memory()


@pytest.mark.parametrize("size", [10**6, 10**15])
def test_onnx_files_that_need_more_memory_than_allowed(tmp_path, little_memory, size):
    """Neither a run takes more, nor the session when it is made, which could compute this constant."""
    nodes = [
        constant("size", np.array([size])),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["scores"]),
    ]
    path = write_onnx(tmp_path / "model.onnx", nodes, [("scores", TensorProto.FLOAT)])
    with pytest.raises(CheckpointError, match=r"model.onnx: onnxruntime cannot run it: needs more than 0.000977 GiB"):
        Detector.from_checkpoint(path).predict(Image.new("RGB", (64, 64)))


def test_onnx_files_with_a_loop_without_end_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "LONGEST_RUN", 0.2)
    body = helper.make_graph(
        [helper.make_node("Identity", ["more"], ["again"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, [])],
    )
    body.node.append(helper.make_node("Cast", ["i"], ["x"], to=TensorProto.INT64))
    body.output.append(helper.make_tensor_value_info("x", TensorProto.INT64, []))
    body.input.append(helper.make_tensor_value_info("state", TensorProto.INT64, []))
    del body.output[1:]
    body.output.append(helper.make_tensor_value_info("x", TensorProto.INT64, []))
    nodes = [
        constant("true", np.array(True)),
        constant("zero", np.array(0)),
        helper.make_node("Loop", ["", "true", "zero"], ["scores"], body=body),
    ]
    path = write_onnx(tmp_path / "model.onnx", nodes, [("scores", TensorProto.INT64)])
    with pytest.raises(CheckpointError, match=r"model.onnx: onnxruntime cannot run it: .*terminate"):
        Detector.from_checkpoint(path).predict(Image.new("RGB", (64, 64)))


def test_pictures_that_another_program_would_draw_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("something was started"))
    with pytest.raises(DataError, match=r"picture.jpg: cannot be read as an image"):
        read_image(path)


def test_videos_that_name_other_files_are_refused(tmp_path):
    pytest.importorskip("av")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.gif")
    list_of_files = tmp_path / "clip.mp4"
    list_of_files.write_text("ffconcat version 1.0\nfile secret.gif\n")
    with pytest.raises(DataError, match=r"clip.mp4: cannot be read as a video"):
        list(read_frames(Media(list_of_files, "clip.mp4")))


def test_the_script_lists_what_ends_badly(tmp_path, monkeypatch, capsys):
    """A kind of file whose user crashes, exits and forgets to name the file."""

    def use(path):
        number = path.stat().st_size % 3
        if number == 0:
            raise CheckpointError("it is bad")
        if number == 1:
            raise IndexError(number)
        raise CheckpointError(f"{path}: it is bad")

    kind = fuzz.Kind(".x", (bytes(range(200)),), use)
    monkeypatch.setattr(fuzz, "make_kinds", lambda folder: {"bad": lambda: kind})
    monkeypatch.setattr(sys, "argv", ["fuzz", "--work", "bad", "--count", "30", "--out", str(tmp_path)])
    fuzz.main()
    text = capsys.readouterr().out
    assert "the error does not name the file: CheckpointError: it is bad" in text
    assert "IndexError" in text
    kept = list((tmp_path / "bad").glob("[0-9]*.x"))
    assert 0 < len(kept) == text.count('"wrong"') < 30
