"""Shards are read like folders: in any order, each sample once, the broken ones listed."""

import importlib.util
import io
import json
import struct
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from commands import dat
from kills import assert_same_run
from odd_images import encode
from PIL import Image

from dat.classification import shards
from dat.classification.config import ClassificationConfig, DataConfig, SplitConfig
from dat.classification.readers import open_split
from dat.classification.shards import RecordReader, Shards, index_records
from dat.classification.train import train
from dat.engine.config import from_dict
from dat.utils.errors import ConfigError, DataError

CLASSES = ["blue", "green", "red"]


def picture(value, format="PNG"):
    return encode(Image.new("RGB", (6, 5), (value, 0, 0)), format)


def write_shard(path, samples):
    """`samples`: {"key.extension": content}."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(first, count, label=lambda i: str(i % 3), extension="png"):
    """Image i has the red of i, and the class i mod 3."""
    files = {}
    for i in range(first, first + count):
        files |= {f"{i:03}.{extension}": picture(i), f"{i:03}.cls": label(i).encode()}
    return files


@pytest.fixture
def web(tmp_path):
    """24 samples in 3 shards for training, 7 in 2 for validation."""
    root = tmp_path / "web"
    splits = {"train": [(0, 8), (8, 9), (17, 7)], "val": [(0, 4), (4, 3)]}
    info = {}
    for name, parts in splits.items():
        files = [f"{name}-{i}.tar" for i in range(len(parts))]
        for file, (first, count) in zip(files, parts, strict=True):
            write_shard(root / file, samples(first, count))
        lengths = [count for _, count in parts]
        info[name] = {
            "name": name,
            "filenames": files,
            "shard_lengths": lengths,
            "num_samples": sum(lengths),
        }
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


def data_of(web, split="train", **changes):
    settings = SplitConfig(f"wds/{web.name}", split)
    return DataConfig(**{"root": str(web.parent), "train": settings, "val": settings, **changes})


def contents(split):
    """{(red, class)} of what can be read, in order."""
    return [(picture.getpixel((0, 0))[0], label) for picture, label in map(split.read, range(len(split)))]


@pytest.mark.parametrize("pattern", ["train", "train-{0..2}.tar"])
def test_every_sample_of_the_shards_in_any_order(web, pattern):
    split = open_split(data_of(web, pattern, class_names="names.txt"), "train")
    assert contents(split) == [(i, i % 3) for i in range(24)]
    assert split.class_names == CLASSES
    assert (split.name(9), split.left_out) == ("train-1.tar/009", [])
    assert split.read(20)[0].getpixel((0, 0)) == (20, 0, 0)


def test_classes_are_numbered_as_in_training(web):
    assert open_split(data_of(web), "train").class_names == ["0", "1", "2"]
    write_shard(web / "few.tar", samples(1, 1) | samples(7, 1))
    assert open_split(data_of(web, "few.tar"), "val", CLASSES).class_names == ["green"]
    with pytest.raises(DataError, match="class 2 is not among the 2 of the training data"):
        open_split(data_of(web), "val", CLASSES[:2])
    write_shard(web / "many.tar", samples(0, 2, lambda i: "9999999999"))
    with pytest.raises(DataError, match=r"class 9999999999 of 2 samples; data.class_names should name a file"):
        open_split(data_of(web, "many.tar"), "train")


def test_classes_of_one_name_keep_their_numbers(web):
    """ImageNet has two classes named crane."""
    names = ["crane", "dog", "crane"]
    (web.parent / "names.txt").write_text("\n".join(names))
    data = data_of(web, class_names="names.txt")
    for split in (open_split(data, "train"), open_split(data, "val", names)):
        assert contents(split) == [(i, i % 3) for i in range(24)]
        assert split.class_names == names


def test_classes_in_json(web):
    files = {}
    for i, name in enumerate(["red", "blue", "red"]):
        meta = json.dumps({"kind": {"name": name}, "number": i - 1}).encode()
        files |= {f"a/{i}.x.jpg": b"", f"a/{i}.jpeg": picture(i, "JPEG"), f"a/{i}.json": meta}
    # files of one sample are beside each other
    write_shard(web / "json.tar", {name: files[name] for name in sorted(files, key=lambda name: name[:3])})
    data = data_of(web, "json.tar")
    data.train.label_key = "kind/name"
    split = open_split(data, "train")
    assert (split.class_names, [split.read(i)[1] for i in range(3)]) == (["blue", "red"], [1, 0, 1])
    with pytest.raises(DataError, match="class 'blue' is not among the 2 of the training data"):
        open_split(data, "val", ["red", "green"])
    # as timm: negative ones are not meant for this split
    data.train.label_key = "number"
    assert [split.read(i)[1] for split in [open_split(data, "train")] for i in range(len(split))] == [0, 1]


def test_what_is_broken_is_listed_and_all_else_is_read(web):
    whole = (web / "train-1.tar").read_bytes()
    # within the picture of the sixth
    (web / "train-1.tar").write_bytes(whole[: 5 * 2 * 1024 + 530])
    broken = samples(17, 7)
    broken["018.png"] = b"no picture"
    broken["020.cls"] = b"what?"
    del broken["021.png"]
    write_shard(web / "train-2.tar", broken)
    middle = bytearray((web / "train-0.tar").read_bytes())
    middle[4096:4608] = b"x" * 512
    (web / "train-0.tar").write_bytes(middle)
    split = open_split(data_of(web), "train")
    assert split.left_out == [
        "train-0.tar: no tar from byte 4096 on",
        "train-0.tar: 2 of the 8 samples that it should hold",
        "train-1.tar: unexpected end of data",
        "train-1.tar: 5 of the 9 samples that it should hold",
        "train-2.tar/020",
        "train-2.tar/021",
    ]
    names = [split.name(i)[-3:] for i in range(len(split))]
    assert names == ["000", "001", *(f"{i:03}" for i in range(8, 13)), "017", "018", "019", "022", "023"]


def test_a_shard_that_ends_between_two_samples_is_listed(web):
    whole = (web / "train-1.tar").read_bytes()
    (web / "train-1.tar").write_bytes(whole[: 5 * 2 * 1024])
    split = open_split(data_of(web, "train-1.tar"), "train")
    assert (len(split), split.left_out) == (5, ["train-1.tar: unexpected end of data"])


def test_shards_need_no_file_of_splits(web, caplog):
    (web / "_info.json").unlink()
    assert len(open_split(data_of(web, "train-{0..2}.tar"), "train")) == 24
    with pytest.raises(DataError, match=r"data.train: cannot load split 'train' of wds/web: split train not found"):
        open_split(data_of(web), "train")
    assert not caplog.records


def test_a_run_on_shards(web, settings, tmp_path):
    """It meets every sample, tells of the broken one, and goes on after a stop as if nothing had been."""
    broken = samples(17, 7)
    broken["018.png"] = b"no picture"
    write_shard(web / "train-2.tar", broken)
    path = f"wds/{web.name}"
    settings["data"] |= {"root": str(web.parent), "class_names": "names.txt"}
    settings["data"] |= {"train": {"path": path, "split": "train"}, "val": {"path": path, "split": "val"}}
    settings["train"] |= {"epochs": 2, "pictures": 2, "worst": 2, "checkpoint_steps": 0}
    for output, stages in (("whole", (2,)), ("stopped", (1, 2))):
        for epochs in stages:
            changes = {"epochs": epochs, "resume": epochs > stages[0], "min_lr_scale": 1, "warmup_epochs": 0}
            run = {**settings, "output": str(tmp_path / output), "train": {**settings["train"], **changes}}
            metrics = train(from_dict(ClassificationConfig, run, "test"))
        assert metrics["steps"] == 8
        assert (tmp_path / output / "skipped.txt").read_text() == "train-2.tar/018\n"
        assert json.loads((tmp_path / output / "metrics.json").read_text())["images"] == 7
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_audit_of_shards(web, tmp_path, capsys):
    shards = [f"data.{name}.{key}" for name in ("train", "val") for key in ("path=wds/web", f"split={name}")]
    dat("classify", "audit", tmp_path, *shards, "data.class_names=names.txt", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "24 images, 24 of them can be read (24 RGB)" in printed
    assert "training can start" in printed
    rows = json.loads((tmp_path / "out/audit.json").read_text())["train"]["classes"]
    assert rows == [{"name": name, "images": 8} for name in CLASSES]


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("wds/none", "train", r"data.train: .*none should be a folder of WebDataset shards on this machine"),
        ("wds/web", "test", r"data.train: cannot load split 'test' of wds/web: split test not found in info"),
        ("wds/web", "none-{0..3}.tar", r"cannot load split .*No such file .*none-0.tar'"),
        ("wds/web", "names.tar", r"no sample with an image \(jpg, .*\) and a class \(cls\); left out: names.tar: "),
    ],
)
def test_shards_that_are_not_there(web, path, split, message):
    (web / "names.tar").write_text("blue\n")
    data = data_of(web)
    data.train = SplitConfig(path, split)
    with pytest.raises(DataError, match=message):
        open_split(data, "train")


def test_names_of_shards_run_nothing(web, tmp_path):
    data = DataConfig(root="", train=SplitConfig(f"wds/pipe:touch {tmp_path}/ran"))
    with pytest.raises(DataError, match="should be a folder of WebDataset shards"):
        open_split(data, "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("path", "package"), [("wds/web", "webdataset"), ("tfds/mnist", "importlib_resources")])
def test_other_packages_are_asked_for(monkeypatch, path, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"data.train.path is '{path}', which needs another package: .* {package}$"):
        open_split(DataConfig(train=SplitConfig(path)), "train")


def write_records(path, contents):
    path.write_bytes(b"".join(struct.pack("<QI", len(part), 0) + part + b"sums" for part in contents))
    return str(path)


def test_records(tmp_path, monkeypatch):
    """Of TFRecord files, the package's part of it stood in for."""
    first = write_records(tmp_path / "a-0", [b"%d" % i for i in range(5)])
    second = write_records(tmp_path / "a-1", [b"%d" % i for i in range(5, 9)])
    found, left_out = index_records([(first, 2, 3), (second, 0, 2)])
    assert ([found[i] for i in range(len(found))], left_out) == ([b"2", b"3", b"4", b"5", b"6"], [])
    monkeypatch.setattr(shards, "encoded", lambda key: {key: "bytes"})

    def deserialize(record, decoders):
        assert decoders == {"photo": "bytes"}
        return {"photo": np.bytes_(picture(int(record))), "kind": np.int64(int(record) % 2)}

    features = SimpleNamespace(deserialize_example_np=deserialize)
    reader = RecordReader(found, features, "photo", "kind")
    file, label = reader[3]
    assert (Image.open(file).getpixel((0, 0)), label, reader.filename(3)) == (
        (5, 0, 0),
        1,
        "record 3 of the split, in a-1",
    )
    (tmp_path / "a-1").write_bytes((tmp_path / "a-1").read_bytes()[:-20])
    assert index_records([(second, 0, 4)])[1] == ["a-1: damaged, 1 records cannot be found"]
    assert isinstance(found, Shards)
