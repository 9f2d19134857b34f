"""Data whose splits the configuration does not name: class folders, and tars."""

import io
import tarfile

import pytest
from odd_images import encode
from PIL import Image

from dat.classification.config import ClassificationConfig, DataConfig, SplitConfig
from dat.classification.readers import READERS, open_place, open_split, register_reader
from dat.classification.train import train
from dat.engine.config import from_dict
from dat.utils.errors import DataError

PNG = encode(Image.new("RGB", (8, 8)), "PNG")


def write_files(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)


def write_tar(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PNG)
            tar.addfile(member, io.BytesIO(PNG))


def names(split):
    return [split.name(i) for i in range(len(split))]


# "few" has too few images for one to be held out
CLASSES = [f"{name}/{i}.png" for name, images in (("cat", 12), ("dog", 5), ("few", 4)) for i in range(images)]
HELD_OUT = ["cat/4.png", "cat/9.png", "dog/4.png"]


@pytest.mark.parametrize("kind", ["folder", "root is a tar", "tar in the root"])
def test_every_fifth_image_of_each_class_is_for_validation(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "folder":
        write_files(root, CLASSES)
    else:
        root = root / "all.tar" if kind == "root is a tar" else root
        write_tar(root if kind == "root is a tar" else root / "all.tar", CLASSES)
    data = DataConfig(root=str(root))
    train = open_split(data, "train")
    val = open_split(data, "val", train.class_names)
    assert names(val) == HELD_OUT
    assert sorted(names(train) + HELD_OUT) == sorted(CLASSES)
    assert (train.class_names, val.class_names) == (["cat", "dog", "few"], ["cat", "dog"])
    assert [val.read(i)[1] for i in range(3)] == [0, 0, 1]
    assert train.read(len(train) - 1)[1] == 2
    assert "of each class every 5th image, by name, is for validation (3 of 21 images)" in val.note
    # classes of a model that has others
    assert open_split(data, "val", ["few", "x", "dog", "cat"]).read(0)[1] == 3


def test_a_run_on_class_folders_says_what_it_validates_on(settings, pictures, tmp_path):
    settings["data"]["root"] = str(pictures / "train")
    settings["train"]["epochs"] = 1
    train(from_dict(ClassificationConfig, settings, "test"))
    log = (tmp_path / "run/train.log").read_text()
    assert "every 5th image, by name, is for validation (3 of 24 images)" in "\n".join(log.splitlines()[:4])
    assert "21 training and 3 validation images, 3 classes" in log


@pytest.mark.parametrize("prefix", ["", "pets_"])
def test_two_tars_are_found(tmp_path, prefix):
    write_tar(tmp_path / f"{prefix}train.tar", ["cat/1.png", "dog/1.png"])
    write_tar(tmp_path / f"{prefix}val.tar", ["dog/2.png"])
    write_tar(tmp_path / "other.tar", ["cat/3.png"])
    data = DataConfig(root=str(tmp_path))
    train, val = open_split(data, "train"), open_split(data, "val", ["cat", "dog"])
    assert (names(train), names(val), val.read(0)[1]) == (["cat/1.png", "dog/1.png"], ["dog/2.png"], 1)
    assert train.note == f"{tmp_path}/{prefix}train.tar serves as train"


@pytest.mark.parametrize(
    ("files", "tars", "message"),
    [
        (
            [],
            [],
            r"data.train.path: \S+/train does not exist, \S+ holds neither folders nor .tar files;",
        ),
        (["cat/1.png"], [], r"holds cat; data.train.path should name a folder .* with one folder per class$"),
        (["val/cat/1.png", "test/dog/1.png"], [], r"holds test, val; data.train.path .* with one folder per class$"),
        (["a/b/1.png"], ["test.tar", "val.tar"], r"holds a, test.tar, val.tar; .* with one folder per class$"),
        (["a/b/1.png"], ["valid.tar", "x.tar", "y.tar"], r"holds a, valid.tar, x.tar, y.tar; .*=x.tar$"),
        (["Train/cat/1.png", "training/cat/1.png"], [], r"holds Train, training; .* such as data.train.path=Train$"),
        (["val/cat/1.png", "cat/1.png", "dog/1.png"], [], r"/train does not exist, \S+ holds cat, dog, val;"),
        (
            ["a/b/1.png", "a/c/1.png", "d/e/1.png"],
            [],
            r"holds a, d with images deeper .*, such as a/b/1.png; .* folder per",
        ),
        ([], ["a.tar", "b.tar"], r"holds a.tar, b.tar; .* such as data.train.path=a.tar$"),
        ([], ["a_train.tar", "b_train.tar", "val.tar"], r"holds a_train.tar, b_train.tar; .*=a_train.tar$"),
        ([f"{k}/{i}.png" for k in "ab" for i in range(4)], [], r"0 of 8 images\), too few; data.train.path and"),
    ],
)
def test_what_is_there_is_named_where_no_split_can_be_found(tmp_path, files, tars, message):
    write_files(tmp_path, files)
    for tar in tars:
        write_tar(tmp_path / tar, ["cat/1.png"])
    with pytest.raises(DataError, match=message):
        open_split(DataConfig(root=str(tmp_path)), "train")


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Val"), ("training", "valid"), ("Training", "Validation"), ("Train.tar", "pets_valid.tar")],
)
def test_splits_have_other_names_too(tmp_path, train, val):
    for place, files in ((train, ["cat/1.png", "dog/1.png"]), (val, ["dog/2.png"]), ("test", ["cat/3.png"])):
        if place.endswith(".tar"):
            write_tar(tmp_path / place, files)
        else:
            write_files(tmp_path / place, files)
    data = DataConfig(root=str(tmp_path))
    splits = open_split(data, "train"), open_split(data, "val", ["cat", "dog"])
    assert [names(split) for split in splits] == [["cat/1.png", "dog/1.png"], ["dog/2.png"]]
    assert [split.note for split in splits] == [
        f"{tmp_path / train} serves as train",
        f"{tmp_path / val} serves as val",
    ]


def test_classes_may_have_the_names_of_splits(tmp_path):
    write_files(tmp_path, [f"{name}/{i}.png" for name in ("training", "resting") for i in range(5)])
    assert open_split(DataConfig(root=str(tmp_path)), "train").class_names == ["resting", "training"]


def test_a_test_set_may_be_for_validation_but_not_what_is_for_training(tmp_path):
    write_files(tmp_path, ["train/cat/1.png", "train/dog/1.png"])
    with pytest.raises(DataError, match=r"/val does not exist, \S+ holds train; .* with one folder per class$"):
        open_split(DataConfig(root=str(tmp_path)), "val")
    write_files(tmp_path, ["Test/cat/1.png", "extra/cat/1.png"])
    write_tar(tmp_path / "all.tar", ["cat/1.png"])
    with pytest.raises(DataError, match=r"holds Test, all.tar, extra, train; .* such as data.val.path=Test$"):
        open_split(DataConfig(root=str(tmp_path)), "val")
    with pytest.raises(DataError, match=r"such as data.val.path=all.tar$"):
        open_split(DataConfig(root=str(tmp_path), train=SplitConfig("Test")), "val")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["cats/indoor/1.png", "cats/a/b/1.png"], "has cats/1.png, but cats/a/b/1.png lies deeper"),
        (["sheet.png"], "has cats/1.png, but sheet.png outside of folders"),
    ],
)
def test_an_image_that_keeps_folders_from_being_classes_is_named(tmp_path, more, problem):
    write_files(tmp_path, ["cats/1.png", "dogs/1.png", *more])
    with pytest.raises(DataError) as raised:
        open_split(DataConfig(root=str(tmp_path)), "train")
    assert str(raised.value) == (
        f"data.train.path: {tmp_path}/train does not exist, and {tmp_path} {problem}; folders of classes in data.root "
        "should hold the images themselves, or there should be folders train and val with one folder per class each"
    )


def test_the_first_folder_is_the_class(tmp_path):
    write_files(
        tmp_path / "train",
        ["cats/indoor/1.png", "cats/outdoor/1.png", "dogs/1.png", "dogs/indoor/deep/1.png", "dogs/x/a.txt"],
    )
    (tmp_path / "train/birds/indoor").mkdir(parents=True)
    (tmp_path / "train/dogs/x/a.txt").write_text("no image")
    split = open_split(DataConfig(root=str(tmp_path)), "train")
    assert (split.class_names, split.labels().tolist()) == (["cats", "dogs"], [0, 0, 1, 1])
    assert split.deep == ["cats/indoor/1.png", "cats/outdoor/1.png", "dogs/indoor/deep/1.png"]
    assert (split.left_out, split.empty) == (["dogs/x/a.txt"], ["birds"])


def test_the_innermost_folder_of_a_tar_is_the_class(tmp_path):
    data = DataConfig(root=str(tmp_path))
    write_tar(tmp_path / "train.tar", ["./pets/a/cat/1.png", "pets/a/cat/2.png", "pets/dog/1.png"])
    split = open_split(data, "train")
    assert (split.class_names, split.labels().tolist()) == (["cat", "dog"], [0, 0, 1])
    write_tar(tmp_path / "train.tar", ["cat/in/1.png", "cat/out/1.png", "dog/in/1.png"])
    message = r"train.tar has cat/in/1.png and dog/in/1.png; in a .tar the class is the innermost folder, 'in' of both"
    with pytest.raises(DataError, match=message):
        open_split(data, "train")


def test_a_tar_that_ends_early_is_refused(tmp_path):
    """tarfile reads the members up to there without an error."""
    whole = tmp_path / "all.tar"
    write_tar(whole, ["cat/1.png", "dog/1.png", "cat/2.png", "notes.txt"])
    content = whole.read_bytes()
    # Each member has one block of header and one of content.
    for size, reason in (
        (6 * 512, "unexpected end of data"),
        (6 * 512 + 100, "unexpected end of data"),
        (6 * 512 - 30, "unexpected end of data"),
        (5 * 512 + 30, "unexpected end of data"),
        (7 * 512 + 30, "unexpected end of data"),
        (8 * 512, "unexpected end of data"),
        (512, "unexpected end of data"),
    ):
        whole.write_bytes(content[:size])
        with pytest.raises(
            DataError, match=rf"here: \S+/all.tar is truncated or damaged: {reason}; it should be a whole"
        ):
            open_place(whole, "here")
    for start, end, reason in ((2 * 512, 3 * 512, "no tar from byte 1024 on"), (0, 512, "invalid header|bad checksum")):
        whole.write_bytes(content[:start] + b"x" * (end - start) + content[end:])
        with pytest.raises(DataError, match=reason):
            open_place(whole, "here")
    # GNU tar reads those of one block of zeros, with a warning.
    whole.write_bytes(content[: 9 * 512])
    assert names(open_place(whole, "here")) == ["cat/1.png", "cat/2.png", "dog/1.png"]
    write_tar(whole, ["cat/1.png"])
    assert names(open_place(whole, "here")) == ["cat/1.png"]


def test_what_is_left_to_unpack_or_was_unpacked_into_a_folder_is_named(tmp_path):
    data = DataConfig(str(tmp_path))
    for name in ("train.tar.gz", "pets.ZIP"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(
            DataError, match=rf"data.train.path: {tmp_path}/{name} is an archive; it should be unpacked"
        ):
            open_split(data, "train")
        with pytest.raises(DataError, match=rf"{name} is an archive"):
            open_split(DataConfig(str(tmp_path / name)), "train")
        (tmp_path / name).rename(tmp_path / "pets.csv.gz")
    for inside in ("a/train/cat/1.png", "b/cat/1.png"):
        root = tmp_path / inside[0]
        write_files(root / "pets", [inside[2:], inside[2:].replace("cat", "dog")])
        with pytest.raises(DataError, match=rf"data.root: is {root}, should be {root}/pets, the folder in it that has"):
            open_split(DataConfig(str(root)), "train")
        assert len(open_split(DataConfig(str(root / "pets")), "train")) if inside[0] == "a" else True


def test_a_path_that_is_given_is_taken_at_its_word(tmp_path):
    write_files(tmp_path, CLASSES)
    write_files(tmp_path, ["Train/cat/1.png"])
    with pytest.raises(DataError, match=r"data.train.path: \S+/training does not exist"):
        open_split(DataConfig(root=str(tmp_path), train=SplitConfig("training")), "train")
    with pytest.raises(DataError, match=r"data.root: \S+/nowhere does not exist"):
        open_split(DataConfig(root=str(tmp_path / "nowhere")), "train")


def test_a_format_of_ones_own(monkeypatch):
    """It is one function and its registration."""

    class Reader:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return io.BytesIO(PNG), index % 2

        def filename(self, index):
            return f"row {index}"

    def read(data, settings, class_names):
        if settings.split == "nowhere":
            raise KeyError("no such table")
        return Reader(), ["cat", "dog"], ["row 7"]

    monkeypatch.setattr("dat.classification.readers.READERS", dict(READERS))
    register_reader("table", read)
    data = DataConfig(train=SplitConfig("table/pets"), val=SplitConfig("Table/pets", "nowhere"))
    split = open_split(data, "train", ["dog", "cat"])
    assert [split.read(i)[1] for i in range(4)] == [1, 0, 1, 0]
    assert (split.name(3), split.left_out) == ("row 3", ["row 7"])
    with pytest.raises(DataError, match=r"data.val: cannot load split 'nowhere' of Table/pets: 'no such table'"):
        open_split(data, "val")
    monkeypatch.setattr(Reader, "__getitem__", lambda self, index: (io.BytesIO(PNG), -1))
    for use in (lambda: split.read(2), split.labels):
        with pytest.raises(DataError, match=r"row \d: its label is -1, as in splits of the hub without labels"):
            use()


def test_links_in_a_tar_lead_nowhere_outside(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    write_tar(tmp_path / "all.tar", ["cat/1.png", "cat/2.png", "dog/1.png"])
    with tarfile.open(tmp_path / "all.tar", "a") as tar:
        for name, kind, target in (
            ("cat/out.png", tarfile.SYMTYPE, str(secret)),
            ("cat/up.png", tarfile.SYMTYPE, "../../secret.png"),
            ("dog/hard.png", tarfile.LNKTYPE, str(secret)),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    data = DataConfig(root=str(tmp_path), train=SplitConfig("all.tar"), val=SplitConfig("all.tar"))
    split = open_split(data, "train")
    assert sorted(names(split)) == ["cat/1.png", "cat/2.png", "dog/1.png"]
