"""The report of a run or an evaluation: one HTML file without scripts, other files or network access.

Texts such as the names of files and classes may come from anyone; the template escapes them all.
"""

import io
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image

from dat.engine.config import to_dict
from dat.utils.errors import UserError
from dat.utils.files import atomic_write, read_json
from dat.utils.text import printable

# Rows of a table of confusions.
MOST_CONFUSIONS = 20

# Longest edge of embedded photographs, in pixels.
MOST_PIXELS = 1800


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers under the names of their columns; None is shown as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[tuple[str, bool]]]:
        """The text of each entry, and whether it is a number."""
        return [[self._cell(value) for value in row] for row in self.rows]

    @staticmethod
    def _cell(value: Any) -> tuple[str, bool]:
        if value is None:
            return "–", True
        if isinstance(value, float):
            return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 1000 else 1}f}", True
        return str(value), isinstance(value, int)


@dataclass(frozen=True)
class EmbeddedImage:
    """An image file to embed, unchanged or, if it is a `photo` or made of photographs, as JPEG."""

    path: Path
    caption: str = ""
    photo: bool = False

    def uri(self) -> str:
        """The image as a data URI."""
        if not self.photo:
            return f"data:image/png;base64,{b64encode(self.path.read_bytes()).decode()}"
        buffer = io.BytesIO()
        with Image.open(self.path) as image:
            image.thumbnail((MOST_PIXELS, MOST_PIXELS))
            image.convert("RGB").save(buffer, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading: text, tables, images and, folded up, `verbatim` text."""

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    images: Sequence[EmbeddedImage] = ()
    verbatim: str = ""


@dataclass
class Page:
    """A page with a title, an opening text and sections."""

    title: str
    text: str = ""
    sections: list[Section] = field(default_factory=list)

    def add_image(self, heading: str, path: Path, text: str = "", tables: Sequence[Table] = ()) -> None:
        """Adds a section with a plot, if the file exists."""
        if path.is_file():
            self.sections.append(Section(heading, text, tables, [EmbeddedImage(path)]))

    def add_photos(self, heading: str, paths: Sequence[Path], text: str = "") -> None:
        """Adds a section with those of the photographs that exist; several are captioned with their names."""
        images = [
            EmbeddedImage(path, path.stem if len(paths) > 1 else "", photo=True) for path in paths if path.is_file()
        ]
        if images:
            self.sections.append(Section(heading, text, images=images))

    def add_config(self, config: Any) -> None:
        """Adds a section with a configuration (a dataclass) as YAML."""
        values = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        self.sections.append(Section("Configuration", verbatim=values))

    def write(self, path: Path) -> None:
        """Atomically replaces `path` by the page."""
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(_TEMPLATE.generate(page=self))


def confusion_table(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Table:
    """The most frequent confusions, which are off the diagonal of the [R, C] counts."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    places = [np.unravel_index(place, counts.shape) for place in order if wrong.flat[place]]
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    found = [(rows[i], columns[j], int(wrong[i, j]), f"{fractions[i, j]:.1%}") for i, j in places]
    return Table(("true class", "predicted class", "times", "fraction of the true class"), found)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics.json of a run, {} if it is missing or damaged."""
    try:
        metrics = read_json(folder / "metrics.json")
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


@contextmanager
def errors_as_warnings(warn: Callable[[str], None], command: str) -> Iterator[None]:
    """Turns any error inside the block into a warning: a failed plot must not end a finished training.

    `command` writes the report again.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, (UserError, OSError))
        reason = str(error) if known else traceback.format_exc()
        warn(f"the report is not complete: {reason}\nto write it again: {command}")


def _show(value: Any) -> Any:
    return printable(value, keep="\n\t") if isinstance(value, str) else value


# The policy lets the page load and run nothing, should a text ever get into it unescaped.
_TEMPLATE = Environment(
    autoescape=True, finalize=_show, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string(
    """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
  nav a { margin-right: 1rem } p, h1, td, figcaption { overflow-wrap: anywhere; white-space: pre-line }
  img { max-width: 100%; display: block } figure { margin: 1rem 0 } figcaption { color: #555; font-size: .85rem }
  .table { overflow: auto; max-height: 32rem; margin: 1rem 0 }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums }
  th { position: sticky; top: 0; background: #f3f3f3; text-align: left } th, td { padding: .15rem .8rem .15rem .4rem }
  tr:nth-child(even) td { background: #fafafa } td.number { text-align: right }
  pre { overflow: auto; background: #f6f6f6; padding: .8rem }
</style>
<h1>{{ page.title }}</h1>
<p>{{ page.text }}</p>
<nav>
{% for section in page.sections %}
<a href="#part{{ loop.index }}">{{ section.heading }}</a>
{% endfor %}
</nav>
{% for section in page.sections %}
<h2 id="part{{ loop.index }}">{{ section.heading }}</h2>
{% if section.text %}
<p>{{ section.text }}</p>
{% endif %}
{% for table in section.tables %}
<div class="table"><table>
<tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.cells() %}
<tr>{% for text, number in row %}<td{% if number %} class="number"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% for image in section.images %}
<figure><img src="{{ image.uri() }}" alt="{{ image.caption or section.heading }}">
{% if image.caption %}
<figcaption>{{ image.caption }}</figcaption>
{% endif %}
</figure>
{% endfor %}
{% if section.verbatim %}
<details><summary>show</summary><pre>{{ section.verbatim }}</pre></details>
{% endif %}
{% endfor %}
</html>
"""
)
