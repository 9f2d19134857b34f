"""Which files are images, whatever they are named, and which data sets can be read."""

import importlib.util
import io
import tarfile
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from odd_images import encode, odd_files, write_odd_images
from PIL import Image

from dat.classification import readers
from dat.classification.config import ClassificationConfig, DataConfig, SplitConfig
from dat.classification.readers import open_place, open_split
from dat.classification.train import train
from dat.engine.config import from_dict
from dat.utils.errors import ConfigError, DataError
from dat.utils.images import UNREADABLE


def test_all_that_can_be_read_is_trained_on_and_all_else_is_listed(settings, tmp_path):
    """Of 200 files 40 are odd, of every kind twice."""
    root = tmp_path / "odd"
    unreadable = write_odd_images(root / "train", plain=160, odd=40)
    unreadable_val = write_odd_images(root / "val", plain=20, odd=20, seed=1)
    assert len(unreadable) == 12
    settings["data"] |= {"root": str(root), "img_size": 32}
    split = open_place(root / "train", "here")
    # the text file that is a picture by neither name nor content is not among them
    assert len(split) + len(split.left_out) == 200
    settings["train"] |= {"epochs": 1, "batch_size": 2, "ema_decay": 0, "pictures": 0, "log_steps": 50}
    train(from_dict(ClassificationConfig, settings, "test"))
    output = tmp_path / "run"
    assert set((output / "skipped.txt").read_text().splitlines()) == unreadable
    assert set((output / "skipped_val.txt").read_text().splitlines()) == unreadable_val
    assert f"warning: {len(unreadable)} unreadable images were left out" in (output / "train.log").read_text()


def test_every_kind_is_what_it_claims(tmp_path):
    (tmp_path / "a").mkdir()
    for kind, (extension, content, readable) in odd_files(np.random.default_rng(0), 16).items():
        path = tmp_path / "a" / f"{kind}{extension}"
        path.write_bytes(content)
        split = open_place(tmp_path, "here") if kind != "text_by_name" else None
        if split is None:
            path.unlink()
            continue
        if readable:
            picture, label = split.read(0)
            assert (picture.mode, picture.size, label) == ("RGB", (16, 16), 0), kind
        else:
            with pytest.raises(UNREADABLE):
                split.read(0)
        path.unlink()


def test_16_bits_are_scaled(tmp_path):
    (tmp_path / "a").mkdir()
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "a/grey.png")
    picture, _ = open_place(tmp_path, "here").read(0)
    np.testing.assert_allclose(np.asarray(picture)[..., 0], grey / 257, atol=1)


def test_streams_are_refused():
    with pytest.raises(ConfigError, match=r"data.train.path is 'HFIDS/imagenet': timm .* stream, .* tfds/NAME"):
        open_split(DataConfig(root="", train=SplitConfig("HFIDS/imagenet")), "train")


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data.val.path is 'hfds/me/flowers', which .*: pip install datasets"):
        open_split(DataConfig(val=SplitConfig("hfds/me/flowers")), "val")


def test_data_sets_of_the_hub_are_read_by_their_columns(monkeypatch):
    """A stand-in for timm's reader of the package `datasets`, which not every machine has."""
    asked = []

    class Columns:
        features: ClassVar = {"kind": SimpleNamespace(names=["rose", "daisy"])}
        column_names: ClassVar = ["photo", "kind"]
        first: ClassVar = {"photo": {"path": None}}

        def __getitem__(self, index):
            return self.first

    class Reader:
        dataset = Columns()

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return io.BytesIO(encode(Image.new("RGB", (4, 4)), "PNG")), 1

        def filename(self, index):
            return None

    def create_reader(name, **options):
        asked.append((name, options))
        if options["split"] == "nowhere":
            raise ValueError("Unknown split")
        return Reader()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(readers, "create_reader", create_reader)
    data = DataConfig(root="", train=SplitConfig("hfds/me/flowers", "train", "photo", "kind"))
    split = open_split(data, "train")
    assert split.class_names == ["rose", "daisy"]
    assert split.name(0) == "image 0"
    assert split.read(0)[1] == 1
    data.val = SplitConfig("hfds/me/flowers", "validation", "photo", "kind")
    assert open_split(data, "val", ["daisy", "rose"]).read(0)[1] == 0
    columns = {"input_key": "photo", "target_key": "kind", "root": None}
    assert asked == [("hfds/me/flowers", {"split": split, **columns}) for split in ("train", "validation")]
    data.train.split = "nowhere"
    with pytest.raises(DataError, match=r"data.train: cannot load split 'nowhere' of hfds/me/flowers: Unknown split"):
        open_split(data, "train")
    monkeypatch.setitem(Columns.first, "photo", None)
    data.train.split = "train"
    with pytest.raises(DataError, match=r"its column 'photo' \(image_key\) holds no images"):
        open_split(data, "train")
    data.train = SplitConfig("hfds/me/flowers", "train", "photo", "colour")
    with pytest.raises(DataError, match=r"its columns are \['photo', 'kind'\], should be 'photo' .* and 'colour'"):
        open_split(data, "train")


def turned_jpeg():
    """Red above blue, stored upside down."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :, 2], pixels[8:, :, 0] = 250, 250
    exif = Image.Exif()
    exif[0x112] = 3
    return encode(Image.fromarray(pixels), "JPEG", exif=exif)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


HIDDEN = (
    ".ipynb_checkpoints/1-checkpoint.jpg", "cat/.ipynb_checkpoints/1.jpg", "cat/._1.jpg", "@eaDir/1.jpg",
    "__MACOSX/cat/._1.jpg", "dog/@eaDir/1.jpg", "lost+found/1.jpg",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar", "wds"])
def test_every_place_follows_exif_and_passes_over_hidden_files(tmp_path, kind):
    image = turned_jpeg()
    shown = {"cat/1.jpg": image, "cat/2.jpg": image, "dog/1.jpg": image}
    files = {**dict.fromkeys(HIDDEN, image), **shown}
    data = DataConfig(root=str(tmp_path), train=SplitConfig("data"))
    if kind == "folder":
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    elif kind == "tar":
        write_tar(tmp_path / "data.tar", {f"./{name}": content for name, content in files.items()})
        data.train.path = "data.tar"
    else:
        pytest.importorskip("webdataset", reason="the extra 'wds'")
        (tmp_path / "data").mkdir()
        labels = {name.replace(".jpg", ".cls"): b"0" if "cat" in name else b"1" for name in files}
        write_tar(tmp_path / "data/train-0.tar", dict(sorted({**files, **labels}.items())))
        data.train = SplitConfig("wds/data", "train-0.tar")
    split = open_split(data, "train")
    assert (len(split), len(split.class_names), split.left_out) == (3, 2, [])
    labels = []
    for index in range(3):
        read, label = split.read(index)
        labels.append(label)
        assert read.getpixel((8, 2))[0] > 200
        assert read.getpixel((8, 13))[2] > 200
    assert labels == [0, 0, 1]


def test_hidden_folders_are_no_splits(tmp_path):
    for name in ("cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "@eaDir/a/1.png"):
        for i in range(5):
            path = (tmp_path / name).with_name(f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "._pets_train.tar").write_bytes(b"resource fork")
    assert open_split(DataConfig(root=str(tmp_path)), "train").class_names == ["cat", "dog"]


@pytest.mark.parametrize("size", [(1, 1), (4, 4000)])
def test_images_that_show_nothing_are_left_out(tmp_path, size):
    (tmp_path / "a").mkdir()
    Image.new("RGB", size).save(tmp_path / "a/1.png")
    with pytest.raises(UNREADABLE, match=r"the image: .* pixels are too"):
        open_place(tmp_path, "here").read(0)
