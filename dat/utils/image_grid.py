"""Sheets of pictures under their titles."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageOps

from dat.utils.plots import save_plot


def thumbnail(picture: Image.Image) -> Image.Image:
    """A picture no larger than a sheet shows it, to keep until it is drawn."""
    return ImageOps.contain(picture, (256, 256))


def draw_grid(
    pictures: Sequence[tuple[Image.Image, str]], path: Path, columns: int = 8, inches: float = 1.6, heading: str = ""
) -> None:
    """Writes an image of one or more pictures side by side, each under its title.

    Args:
        pictures: with their titles.
        path: of the image.
        columns: most pictures in a row.
        inches: width of a picture, of 120 pixels each.
        heading: of the whole sheet.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    # room for the tallest, but not more than a square and its title
    height = inches * min(1.0, max(picture.height / picture.width for picture, _ in pictures)) + 0.3
    figure = Figure(figsize=(inches * columns, height * rows + 0.4 * bool(heading)), layout="constrained")
    if heading:
        figure.suptitle(heading, parse_math=False)
    for position, (picture, title) in enumerate(pictures, start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(picture)
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.axis("off")
    save_plot(figure, path)
