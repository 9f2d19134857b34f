"""Letters that the default fonts lack are drawn with an installed font, or one warning names a package."""

import logging
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from dat.detection.data import Category
from dat.detection.draw import draw_boxes
from dat.utils import fonts
from dat.utils.fonts import LabelFonts, choose_fonts, figure_fonts


def make_font(path, letters):
    """A font whose letters are filled squares."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = {ord(letter): f"g{ord(letter)}" for letter in letters}
    glyphs = [".notdef", *names.values()]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap(names)
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    font.setupGlyf({glyph: empty if glyph == ".notdef" else square for glyph in glyphs})
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=900, sTypoDescender=-100)
    font.setupPost()
    font.save(path)
    return path


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs fonts, each given by its file's name and its letters; at first there are only matplotlib's own."""
    installed = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in installed])
    monkeypatch.setattr(fonts, "_warned", set())
    choose_fonts.cache_clear()
    yield lambda name, letters: installed.append(make_font(tmp_path / name, letters)) or installed[-1]
    choose_fonts.cache_clear()


def ink(text, label_fonts):
    """The pixels of a text, [50, 300] bool."""
    image = Image.new("L", (300, 50))
    label_fonts.draw(ImageDraw.Draw(image), 5, 40, text, "white")
    return np.asarray(image) > 128


def test_the_font_with_most_letters_and_the_plainest_style_is_chosen(install):
    install("Han-Bold.ttf", "红色蓝")
    plain = install("Han-Regular.ttf", "红色蓝")
    install("Little-Regular.ttf", "红")
    other = install("Deva-Regular.ttf", "क")
    install("LastResort.ttf", "红色蓝क")
    assert choose_fonts(frozenset("红色")) == (plain,)
    assert set(choose_fonts(frozenset("红色क"))) == {plain, other}


def test_letters_of_an_installed_font_are_drawn_with_it(install):
    install("Han-Regular.ttf", "红色")
    label_fonts = LabelFonts(["红色", "dog"], 20)
    pixels = ink("红色", label_fonts)
    # Two squares of 18 pixels in 20.
    assert pixels[22:40, 5:23].all()
    assert pixels[22:40, 25:43].all()
    assert not pixels[:, 44:].any()
    left, top, right, bottom = label_fonts.bbox("红色")
    assert (left, top, bottom) == (0, -18, 0)
    assert 38 <= right <= 40
    mixed = ink("红 dog", label_fonts)
    assert mixed[22:40, 5:23].all()
    assert (mixed[:, 30:] == ink(" dog", LabelFonts(["dog"], 20))[:, 10:-20]).all()


def test_plain_texts_look_the_same_with_other_fonts_beside(install):
    install("Han-Regular.ttf", "红a")
    assert (ink("a dog 0.95", LabelFonts(["红"], 20)) == ink("a dog 0.95", LabelFonts([], 20))).all()


def test_accents_need_no_installed_font(install, caplog):
    label_fonts = LabelFonts(["café", "Жук", "cafe\u0301"], 20)
    assert len(label_fonts.fonts) == 2
    assert not (ink("é", label_fonts) == ink("ü", label_fonts)).all()
    assert (ink("e\u0301", label_fonts) == ink("é", label_fonts)).all()
    assert not caplog.records


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "", " ", "\u200b", "a\x00b", "\ud800", "\U0010ffff"])
def test_any_text_can_be_drawn(install, text):
    label_fonts = LabelFonts([text], 20)
    ink(text, label_fonts)
    left, top, right, bottom = label_fonts.bbox(text)
    assert left <= right
    assert top <= bottom


def test_one_warning_names_the_packages(install, caplog, tmp_path):
    categories = [Category(1, "红色"), Category(2, "हरा")]
    result = {"category_id": 1, "bbox": [5, 5, 20, 20]}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            draw_boxes(Image.new("RGB", (64, 64)), [result], categories)
    (record,) = caplog.records
    assert "no installed font has the letters" in record.getMessage()
    assert "红" in record.getMessage()
    assert record.getMessage().endswith("fonts-noto-cjk and fonts-noto-core")


@pytest.mark.parametrize("there", [True, False])
def test_figures(install, there, tmp_path, caplog):
    if there:
        install("Figure-Regular.ttf", "红色")

    def draw(text):
        figure = Figure(figsize=(2, 1), dpi=100)
        figure.text(0.1, 0.3, text, fontsize=36)
        with figure_fonts(figure):
            figure.savefig(tmp_path / "figure.png")
        return np.asarray(Image.open(tmp_path / "figure.png").convert("L"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn, again = draw("红色"), draw("红色 a")
    assert [("fonts-noto-cjk" in record.getMessage()) for record in caplog.records] == [] if there else [True]
    # Two squares of 0.9 of 50 pixels.
    assert ((drawn < 128).sum() > 3500) == there
    assert (again < 128).sum() > (drawn < 128).sum()


def test_a_detection_has_its_class_name_in_an_installed_font(install):
    install("Han-Regular.ttf", "红")
    image = draw_boxes(
        Image.new("RGB", (640, 480)), [{"category_id": 1, "bbox": [50, 50, 90, 90], "score": 0.5}], [Category(1, "红")]
    )
    # Black letters on the class's colour.
    assert (np.asarray(image)[38:48, 53:61] == 0).all()
