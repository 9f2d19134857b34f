"""Files that commands read and leave: found in order, replaced at once."""

import json
import os

import pytest
from PIL import Image

from dat.utils.errors import ConfigError, DataError, ImageError
from dat.utils.files import (
    check_folder,
    file_name,
    file_names,
    find_images,
    list_files,
    read_json,
    read_jsonl,
    write_json,
)
from dat.utils.images import read_image


@pytest.mark.parametrize("content", [{"AP": 0.5}, [{"score": 1}, {"score": 0.5}], []])
def test_json_is_read_back(tmp_path, content):
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content


def test_json_that_is_refused_is_named(tmp_path):
    for text in (b"[" * 100_000, b"9" * 5000, b"{", b"\xff", b""):
        (tmp_path / "x.json").write_bytes(text)
        with pytest.raises(DataError, match=r"x.json: is not JSON: [^\n]+$"):
            read_json(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' + b"[" * 100_000 + b'\n[1]\n\xff\n{"a": 2}\n{"a"')
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_failed_write_keeps_the_old_file_alone(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", [1])

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", [2])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == [1]


def test_images_of_a_folder(tmp_path):
    names = ["10.jpg", "9.JPG", "a/1.png", "a/._1.png", "notes.pdf", "clip.mpg", "out/1.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(**options):
        lists = find_images(tmp_path, **options)
        return [[path.relative_to(tmp_path).as_posix() for path in paths] for paths in lists]

    others = ["clip.mpg", "notes.pdf"]
    assert found() == [["9.JPG", "10.jpg", "a/1.png", "out/1.png"], others]
    assert found(exclude=tmp_path / "out") == [["9.JPG", "10.jpg", "a/1.png"], others]
    assert found(exclude=tmp_path) == found(exclude=tmp_path.parent) == found()
    assert found(more=[".mpg"])[0][-1] == "out/1.png"
    assert found(more=[".mpg"])[1] == ["notes.pdf"]
    assert find_images(tmp_path / "clip.mpg") == ([tmp_path / "clip.mpg"], [])


def test_nothing_to_find_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="no such image or folder"):
        find_images(tmp_path / "none")


def test_names_that_are_too_long_are_shortened_and_stay_distinct(tmp_path):
    assert [file_name(text) for text in ("a b-c_d", "a/b.png", " ", "x" * 240, "字" * 80)] == [
        "a b-c_d", "a_b_png", "_", "x" * 240, "字" * 80,
    ]  # fmt: skip
    texts = ["x" * 900, "x" * 901, "字" * 90, "x" + "字" * 90, "/" * 300, ":" * 300, "\udce9" * 300]
    names = [file_name(text) for text in texts]
    assert len(set(names)) == len(names)
    for name in names:
        (tmp_path / f"{name}_points.png").touch()


def test_classes_whose_names_differ_in_unsafe_letters_have_their_own_names():
    names = file_names(["a_b", "a/b", "a:b", "c/d", "e"])
    assert len(set(names.values())) == 5
    assert [names[text] for text in ("a_b", "c/d", "e")] == ["a_b", "c_d", "e"]
    assert names["a/b"].startswith("a_b_")


def test_what_stands_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    for name in ("file", "loop", "gone"):
        for place in (tmp_path / name, tmp_path / name / "a/b"):
            with pytest.raises(
                ConfigError, match=rf"^--out: \S+{name} is a file or a broken link, should be a folder$"
            ):
                check_folder(place, "--out")
    (tmp_path / "link").symlink_to(".")
    check_folder(tmp_path / "link/new/newer", "--out")


def test_links_that_lead_to_themselves_are_no_images(tmp_path):
    (tmp_path / "1.png").touch()
    (tmp_path / "2.png").symlink_to("2.png")
    assert find_images(tmp_path, exclude=tmp_path / "out") == ([tmp_path / "1.png"], [tmp_path / "2.png"])


def test_links_back_are_not_followed_for_ever(tmp_path):
    for name in ("cats", "more/dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.jpg").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.jpg").touch()
    links = {
        "data/cats/up": "data",
        "data/cats/round": "elsewhere",
        "elsewhere/back": "data/cats",
        "data/c.jpg": "elsewhere/b.jpg",
        "data/d.jpg": "nowhere",
        "data/e.jpg": "data/e.jpg",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    own = ["c.jpg", "cats/a.jpg", "d.jpg", "e.jpg", "more/dogs/a.jpg"]
    for follow_links, more in ((False, []), (True, ["cats/round/b.jpg"])):
        found = [os.path.relpath(path, tmp_path / "data") for path in list_files(tmp_path / "data", follow_links)]
        assert sorted(found) == sorted(own + more)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in the file system")
def test_pipes_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert find_images(tmp_path) == ([tmp_path / "a.png"], [])
    for name in ("pipe.jpg", "link.jpg"):
        with pytest.raises(DataError, match="no such image"):
            find_images(tmp_path / name)
        with pytest.raises(ImageError, match=f"{name}: .*it is a pipe, a socket or a device, should be a file"):
            read_image(tmp_path / name)
