"""Detections drawn into images, readable at any image size."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from dat.detection.data import Category, ImageRecord, load_record
from dat.utils.fonts import LabelFonts

# The colours of Okabe and Ito, which colour-blind readers can distinguish too, without black.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

# Smaller images are enlarged until their longest edge has this many pixels.
MIN_EDGE = 640


def open_record(record: ImageRecord) -> Image.Image:
    """The image of a record. Raises DataError as load_image does."""
    return F.to_pil_image(load_record(record))


def draw_boxes(
    image: Image.Image, results: Sequence[dict[str, Any]], categories: Sequence[Category], title: str = ""
) -> Image.Image:
    """The image, enlarged where it is small, with the boxes of COCO results or annotations (a "score" is optional)."""
    scale = max(1, -(-MIN_EDGE // max(image.size)))
    # Both would copy an image that may be large; only resize always does.
    image = image if image.mode == "RGB" else image.convert("RGB")
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    unit = max(image.size) / MIN_EDGE
    fonts = LabelFonts([category.name for category in categories], round(13 * unit))
    draw = ImageDraw.Draw(image)
    labels = {category.id: label for label, category in enumerate(categories)}
    # The highest scores are drawn last, on top of the others.
    for result in sorted(results, key=lambda result: result.get("score", 1.0)):
        label = labels[result["category_id"]]
        color = COLORS[label % len(COLORS)]
        x, y, w, h = (value * scale for value in result["bbox"])
        draw.rectangle((x, y, x + w, y + h), outline=color, width=max(2, round(2 * unit)))
        name, score = categories[label].name, f" {result['score']:.2f}" if "score" in result else ""
        _write(draw, (x, y), name, score, fonts, color, image.size)
    if title:
        font = fonts.default
        draw.text((4 * unit, image.height - 20 * unit), title, "white", font, stroke_width=2, stroke_fill="black")
    return image


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Joins two images of the same size side by side, or wide ones one above the other."""
    gap = 6
    wide = left.width > 1.5 * left.height
    size = (left.width, 2 * left.height + gap) if wide else (2 * left.width + gap, left.height)
    both = Image.new("RGB", size, "white")
    both.paste(left, (0, 0))
    both.paste(right, (0, left.height + gap) if wide else (left.width + gap, 0))
    return both


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    name: str,
    score: str,
    fonts: LabelFonts,
    color: str,
    size: tuple[int, int],
) -> None:
    """Draws a label on a coloured background above the corner of a box, shifted to lie inside the image.

    A name that leaves no room for the score is shortened.
    """
    text = name + score
    left, top, right, bottom = fonts.bbox(text)
    while len(name) > 4 and right - left + 4 > size[0]:
        name = name[: len(name) * 9 // 10]
        text = f"{name}...{score}"
        left, top, right, bottom = fonts.bbox(text)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=color)
    fonts.draw(draw, x + 2 - left, y + 2 - top, text, "black")
