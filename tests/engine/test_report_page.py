"""The page of a run: whole, escaped, without network; and what happens where it cannot be written."""

import io
from base64 import b64decode
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dat.engine.report import MOST_PIXELS, Page, Section, Table, confusion_table, errors_as_warnings
from dat.utils.errors import DataError

NASTY = "<script>alert(1)</script> \"'><img src=http://x/y.png onerror=z> {{ 7 * 7 }} &amp; $x$"


class Reader(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self):
        """The embedded images."""
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/") for source in sources)
        return [Image.open(io.BytesIO(b64decode(source.partition(";base64,")[2]))) for source in sources]


@dataclass
class Config:
    name: str


def test_every_text_is_escaped(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    page = Page(NASTY, NASTY, [Section(NASTY, NASTY, [Table([NASTY], [[NASTY]])], verbatim=NASTY)])
    page.add_photos(NASTY, [tmp_path / "a.png", tmp_path / "b.png"], NASTY)
    page.add_config(Config(NASTY))
    page.write(tmp_path / "report.html")
    found = Reader(tmp_path / "report.html")
    assert found.text.count(NASTY) >= 9
    assert "script" not in {tag for tag, _ in found.tags}
    assert len(found.images()) == 2
    addresses = [v for _, attributes in found.tags for k, v in attributes.items() if k in ("src", "href", "onerror")]
    assert all(address.startswith(("data:", "#part")) for address in addresses)
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_pictures_are_inside_and_photographs_are_small(tmp_path):
    plot, photo = tmp_path / "plot.png", tmp_path / "photo.png"
    Image.new("RGB", (2500, 40), "red").save(plot)
    Image.new("RGBA", (3600, 900), "blue").save(photo)
    page = Page("title")
    page.add_image("plot", plot)
    page.add_photos("photographs", [photo])
    # what was not drawn has no section
    page.add_image("absent", tmp_path / "absent.png")
    page.add_photos("absent", [tmp_path / "absent.png"])
    page.write(tmp_path / "report.html")
    assert [section.heading for section in page.sections] == ["plot", "photographs"]
    drawn = Reader(tmp_path / "report.html").images()
    assert [(image.format, image.size) for image in drawn] == [("PNG", (2500, 40)), ("JPEG", (MOST_PIXELS, 450))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.png", "plot.png", "report.html"]


def test_numbers_in_tables():
    cells = Table(["a"], [["x", 3, 0.12345, 1234.5678, None]]).cells()
    assert cells == [[("x", False), ("3", True), ("0.123", True), ("1234.6", True), ("–", True)]]


def test_confusions_are_listed_most_frequent_first():
    counts = np.array([[5, 3, 0], [0, 0, 0], [7, 0, 2]])
    assert confusion_table(counts, ["a", "b", "nothing"], ["a", "b", "missed"]).rows == [
        ("nothing", "a", 7, "77.8%"),
        ("a", "b", 3, "37.5%"),
    ]


def test_a_failure_of_the_report_is_a_warning():
    said = []
    with errors_as_warnings(said.append, "python -m this"):
        raise DataError("a.png: cannot be read")
    with errors_as_warnings(said.append, "python -m this"):
        raise ZeroDivisionError
    assert said[0].splitlines()[0] == "the report is not complete: a.png: cannot be read"
    assert all(text.endswith("python -m this") for text in said)
    assert "Traceback" in said[1]
    assert "ZeroDivisionError" in said[1]
    with pytest.raises(KeyboardInterrupt), errors_as_warnings(said.append, "python -m this"):
        raise KeyboardInterrupt
