"""Fonts of this machine for texts whose letters the default fonts lack, such as class names in Chinese."""

import logging
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

# Fonts with the same box for every letter, and those whose letters have no outlines.
UNUSABLE = ("lastresort", "blank", "color")
# Styles that a plain one is preferred to.
STYLES = ("bold", "black", "light", "thin", "medium", "italic", "oblique", "condensed", "narrow", "mono", "serif")

# Debian's packages, as the warning names them.
CJK, OTHER = "fonts-noto-cjk", "fonts-noto-core"
_warned: set[str] = set()


def missing_letters(texts: Iterable[str], font: FT2Font) -> frozenset[str]:
    """The letters of texts that a font lacks."""
    return frozenset(letter for letter in set("".join(texts)) if not has_letter(font, letter))


def has_letter(font: FT2Font, letter: str) -> bool:
    # Blanks, line breaks and joiners have no shape.
    return unicodedata.category(letter)[0] in "ZC" or font.get_char_index(ord(letter)) > 0


@cache
def choose_fonts(letters: frozenset[str]) -> tuple[Path, ...]:
    """As few installed fonts as have most of the letters, plain styles first; warns of letters that none has."""
    found = {path: letters - missing_letters(letters, font) for path, font in _installed()}
    chosen: list[Path] = []
    left = letters
    while found and left:
        best = max(found, key=lambda path: (len(found[path] & left), -_oddness(path), -len(path.name), path.name))
        if not found[best] & left:
            break
        chosen.append(best)
        left -= found[best]
    if left:
        _warn(left)
    return tuple(chosen)


class LabelFonts:
    """Pillow's default font, and installed ones for the letters of `texts` that it lacks, at one size in pixels."""

    def __init__(self, texts: Iterable[str], size: float):
        self.default = default = ImageFont.load_default(size)
        # Without a size it might be a bitmap font.
        assert isinstance(default, ImageFont.FreeTypeFont)
        self.fonts = [(FT2Font(BytesIO(default.font_bytes)), default)]
        for path in choose_fonts(missing_letters(map(_composed, texts), self.fonts[0][0])):
            self.fonts.append((FT2Font(str(path)), ImageFont.truetype(path, size)))

    def bbox(self, text: str) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a text whose baseline begins at (0, 0)."""
        boxes = [(x, font.getbbox(run, anchor="ls")) for x, run, font in self._runs(text)]
        sides = zip(*((x + b[0], b[1], x + b[2], b[3]) for x, b in boxes), strict=True)
        lefts, tops, rights, bottoms = sides if boxes else ((0,),) * 4
        return min(lefts), min(tops), max(rights), max(bottoms)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, text: str, fill: str) -> None:
        """Draws a text whose baseline begins at (x, y)."""
        for start, run, font in self._runs(text):
            draw.text((x + start, y), run, fill, font, anchor="ls")

    def _runs(self, text: str) -> Iterator[tuple[float, str, ImageFont.FreeTypeFont]]:
        """Parts of the text of one font each, and where they begin; Arabic letters join within a part only."""
        parts: list[tuple[str, int]] = []
        blanks = ""
        for letter in _composed(text):
            kind = unicodedata.category(letter)[0]
            # Behind Arabic, a blank would stand at the left; it goes with the next letter.
            if kind in "ZC":
                blanks += letter
                continue
            number = next((k for k, (font, _) in enumerate(self.fonts) if has_letter(font, letter)), 0)
            # Marks stay with their letter.
            if parts and (number == parts[-1][1] or kind == "M"):
                parts[-1] = (parts[-1][0] + blanks + letter, parts[-1][1])
            else:
                parts.append((blanks + letter, number))
            blanks = ""
        x = 0.0
        for run, number in parts:
            font = self.fonts[number][1]
            yield x, run, font
            x += font.getlength(run)


@contextmanager
def figure_fonts(figure: Figure) -> Iterator[None]:
    """Draws the texts of a figure with fonts for the letters that matplotlib's default lacks, inside the block."""
    texts: list[Any] = figure.findobj(Text)
    default = FT2Font(font_manager.findfont(font_manager.FontProperties()))
    missing = missing_letters((text.get_text() for text in texts), default)
    with warnings.catch_warnings():
        if missing:
            families = [_register(path) for path in choose_fonts(missing)]
            for text in texts:
                text.set_fontfamily([*text.get_fontfamily(), *families])
            # One for each letter; choose_fonts warns once of all.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@cache
def _register(path: Path) -> str:
    """Makes a font known to matplotlib, whose list may be older than the font; returns its family."""
    font_manager.fontManager.addfont(path)
    return FT2Font(str(path)).family_name


def _installed() -> Iterator[tuple[Path, FT2Font]]:
    """Fonts of the machine, and matplotlib's own."""
    for path in {*map(Path, font_manager.findSystemFonts()), Path(font_manager.findfont("DejaVu Sans"))}:
        if any(word in path.name.lower() for word in UNUSABLE):
            continue
        try:
            font = FT2Font(str(path))
        except (RuntimeError, OSError, ValueError):
            continue
        if font.scalable:
            yield path, font


def _oddness(path: Path) -> int:
    return sum(style in path.stem.lower() for style in STYLES)


def _composed(text: str) -> str:
    # Pillow has no baseline for several lines.
    return re.sub(r"\s", " ", unicodedata.normalize("NFC", text))


def _warn(letters: frozenset[str]) -> None:
    """Warns once of each package that is missing."""
    scripts = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
    packages = {CJK if unicodedata.name(letter, "").startswith(scripts) else OTHER for letter in letters} - _warned
    if packages:
        _warned.update(packages)
        shown = "".join(sorted(letters)[:20])
        logger.warning(
            f"warning: no installed font has the letters {shown}, which are drawn as boxes; "
            f"install one, such as Debian's {' and '.join(sorted(packages))}"
        )
