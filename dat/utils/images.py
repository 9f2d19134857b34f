"""Reading image files with Pillow."""

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
# Pillow reports a broken file by any of these.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
    struct.error, zlib.error, tarfile.TarError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Image.open, limited to formats that Pillow decodes itself: EPS would start another program."""
    Image.init()
    return Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN])


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, 8 bits per channel. Raises one of UNREADABLE."""
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would clip all values above 255 to white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def read_image(source: str | Path | BinaryIO, size: tuple[int, int] | None = None) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        source: path or open file.
        size: (width, height) that the annotations give. EXIF orientation is applied unless the stored image has this
            size already. None: it is always applied.
    Raises:
        DataError: the file does not exist or cannot be decoded.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the image"
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
