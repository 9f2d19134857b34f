"""Reading image files with Pillow."""

import struct
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

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


def to_image(source: str | Path | Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Converts a path, image, array or tensor to an RGB image.

    Args:
        source: a path; a PIL image of any mode, whose EXIF orientation is applied; an array [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4] of uint8; or a tensor [1, H, W], [3, H, W] or [4, H, W] of uint8, or of floats 0 to
            1. Four channels are RGB and alpha, which is dropped.

    Raises:
        DataError: none of these, or a file that cannot be read.
    """
    if isinstance(source, (str, Path)):
        return read_image(source)
    if isinstance(source, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(source))
        except UNREADABLE as error:
            raise DataError(f"the image cannot be read: {error}") from error
    array = source
    if isinstance(source, Tensor):
        pixels = source.detach().cpu()
        if pixels.is_floating_point() and pixels.numel():
            if not 0 <= pixels.min() <= pixels.max() <= 1:
                raise DataError(f"the tensor has values {pixels.min():g} to {pixels.max():g}, floats should be 0 to 1")
            pixels = (pixels * 255).round().to(torch.uint8)
        array = (pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).numpy()
    if not isinstance(array, np.ndarray):
        kinds = "a path, a PIL image, an array or a tensor"
        raise DataError(f"the image is of type {type(source).__name__}, should be {kinds}")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        shape = "[C, H, W]" if isinstance(source, Tensor) else "[H, W] or [H, W, C]"
        raise DataError(
            f"the image is {array.dtype} {list(source.shape)}, should be uint8 {shape} with 1, 3 or 4 channels"
        )
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and channels == 1 else array).convert("RGB")
