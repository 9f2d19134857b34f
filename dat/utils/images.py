"""Picture files as Pillow reads them, for models."""

import struct
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dat.utils.errors import DataError

FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Pillow reports a broken file in several ways
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
    struct.error, zlib.error, tarfile.TarError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Image.open of the formats that Pillow decodes itself: for EPS it would start another program."""
    Image.init()
    return Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN])


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, 8 bits a channel. Raises one of UNREADABLE."""
    if picture.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would clip all above 255 to white
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    return picture.convert("RGB")


def read_image(source: str | Path | BinaryIO, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture file in RGB, whatever its mode.

    Args:
        source: path, or an open file.
        size: (width, height) that somebody says the picture has; EXIF orientation is followed where the picture has
            not this size. None: it is always followed.

    Raises:
        DataError: a file that is not there, or cannot be decoded.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the picture"
    try:
        with open_image(source) as image:
            image.load()
            if size is None or image.size != size:
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such image") from error
    except UNREADABLE as error:
        raise DataError(f"{name}: cannot be read as an image: {error}") from error
