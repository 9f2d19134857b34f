"""Reading image files with Pillow: every reader of the package comes here, so that all of them see the same pixels."""

import logging
import os
import re
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from dat.utils.errors import DataError, ImageError, TooManyFilesError, one_line

logger = logging.getLogger(__name__)

FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Pillow reports a broken file by any of these.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
    struct.error, zlib.error, tarfile.TarError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip
HEIC = "HEIC (pip install pillow-heif)"
# Major brands of HEIC files, from byte 8 on; bytes 4 to 8 are "ftyp".
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# A JPEG of 1 MB may have 20,000 scans, each of which passes over all pixels; ordinary progressive ones have about 10.
MOST_SCANS = 100
# Scans times pixels: beyond about 10 seconds of decoding.
MOST_SCANNED = 2**31
# Bytes of a JPEG: no pixels that Pillow decodes fill more.
LARGEST_JPEG = 2**29
# A marker of a JPEG; those left out have no parameters: stuffed bytes, fill bytes, TEM, restarts.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_SCAN, _END = 0xDA, 0xD9

# Pixels that are converted at a time.
STRIP_PIXELS = 2**22

# See check_size.
SHORTEST_SIDE = 4
LARGEST_ASPECT = 500
# Images that span fewer of the 256 levels have hardly any contrast.
FEW_LEVELS = 16

# Depths of the cameras and microscopes whose values are stored as 16 bits or floats.
BITS = (8, 10, 12, 14, 16)
# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, FLOAT_MAX_SAMPLE = 258, 262, 281, 341
# The inverse of how ImageOps.exif_transpose turns images of these orientations, which exchange width and height.
UNTURN = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Decoded(NamedTuple):
    """An image as `decode` reads it.

    Attributes:
        image: RGB, 8 bits per channel.
        mode: Pillow's name of the pixels in the file.
        orientation: EXIF's, 1 (upright) to 8.
        followed: whether the image was turned as it says.
        frames: whether the file has more frames or pages than this first one.
    """

    image: Image.Image
    mode: str
    orientation: int
    followed: bool
    frames: bool


@cache
def _formats() -> list[str]:
    Image.init()
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    return [form for form in (*FORMATS, "HEIF") if form in Image.OPEN]


class LacksHeif(UnidentifiedImageError):
    """The file is HEIC, and the package pillow_heif is not installed."""


def is_special(path: str | Path) -> bool:
    """Whether a path is of a pipe, a socket or a device, or of a link to one: to open it may wait forever."""
    return not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path)


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Image.open, limited to formats that Pillow decodes itself: EPS would start another program.

    HEIC is among them where the package pillow_heif is installed. Raises one of UNREADABLE, or TooManyFilesError.
    """
    if isinstance(source, (str, Path)) and is_special(source):
        raise UnidentifiedImageError("it is a pipe, a socket or a device, should be a file")
    try:
        return Image.open(source, formats=_formats())
    except UnidentifiedImageError as error:
        if "HEIF" not in _formats() and _is_heic(source):
            raise LacksHeif(f"it is {HEIC}") from error
        # Pillow's message shows the file's object.
        raise UnidentifiedImageError("it has no known format of images") from error
    except OSError as error:
        TooManyFilesError.check(error)
        raise
    # Pillow raises it for damaged AVIF files.
    except RuntimeError as error:
        raise UnidentifiedImageError(one_line(error)) from error


def _is_heic(source: str | Path | BinaryIO) -> bool:
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return _is_heic(file)
    source.seek(0)
    start = source.read(12)
    return start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS


def lacks_heif(path: str | Path) -> bool:
    """Whether a file is HEIC by its content, and pillow_heif is not installed."""
    try:
        open_image(path).close()
    except LacksHeif:
        return True
    except UNREADABLE:
        pass
    return False


def decode(source: str | Path | BinaryIO, size: tuple[int, int] | None = None) -> Decoded:
    """Decodes an image file. Raises one of UNREADABLE; see read_image for the arguments and the rules."""
    with open_image(source) as image:
        _check_scans(image)
        try:
            return _convert(image, size, source)
        # Pillow raises it for damaged AVIF files.
        except RuntimeError as error:
            raise OSError(one_line(error)) from error


def upright_size(source: str | Path | BinaryIO) -> tuple[int, int]:
    """(width, height) of the image that `decode` gives without a `size`, from the file's head. Raises as decode."""
    with open_image(source) as image:
        # Pillow gives TIFFs their upright size when it opens them.
        turned = image.format != "TIFF" and _orientation(image) in UNTURN
        return image.size[::-1] if turned else image.size


def to_upright(
    source: str | Path | BinaryIO, size: tuple[int, int], boxes: np.ndarray
) -> tuple[tuple[int, int], np.ndarray]:
    """Boxes [n, 4] of corners in an image that `decode` gives with `size`, as they are in the one it gives without.

    Returns that image's size and the boxes: unchanged where both are the same, or where the file cannot be read.
    """
    if size[0] == size[1] or not len(boxes):
        return size, boxes
    try:
        with open_image(source) as image:
            # Pillow gives TIFFs their upright size when it opens them.
            stored = size[::-1] if image.format == "TIFF" else size
            orientation = _orientation(image) if image.size == stored else 1
    except UNREADABLE:
        return size, boxes
    if orientation not in UNTURN:
        return size, boxes
    upright = size[::-1]
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    new_x = upright[0] - y[:, ::-1] if orientation in (6, 7) else y
    new_y = upright[1] - x[:, ::-1] if orientation in (7, 8) else x
    return upright, np.stack((new_x, new_y), -1).reshape(-1, 4)


def _check_scans(image: Image.Image) -> None:
    """Raises ValueError for an open JPEG file that would take minutes to decode."""
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("JPEG", "MPO"):
        return
    most = min(MOST_SCANS, max(MOST_SCANNED // (image.width * image.height), 1))
    file.seek(0)
    content = file.read(LARGEST_JPEG + 1)
    file.seek(0)
    if len(content) > LARGEST_JPEG:
        raise ValueError(f"it is a JPEG of more than {LARGEST_JPEG >> 20} MiB")
    # Segments are skipped by their lengths, since previews and metadata may hold the same bytes.
    position, scans = 2, 0
    while (marker := _MARKER.search(content, position)) and marker[1][0] != _END:
        scans += marker[1][0] == _SCAN
        if scans > most:
            raise ValueError(
                f"it is a JPEG of more than {most} scans, the most for {image.width}x{image.height} pixels"
            )
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")


def _convert(
    image: Image.Image, size: tuple[int, int] | None = None, source: str | Path | BinaryIO | None = None
) -> Decoded:
    """decode, of an image that is open; `source`: its file, where the image has not been loaded yet."""
    mode = image.mode
    # The further images of MPO files, photographs of phones, are previews and depth maps.
    frames = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    raw_modes = [_raw_mode(tile) for tile in getattr(image, "tile", ())]
    deep = any(raw_mode.startswith(("RGB;16", "RGBA;16")) for raw_mode in raw_modes)
    # Read before the pixels: Pillow turns TIFFs as it loads them.
    orientation = _orientation(image)
    image.load()
    if deep and source is not None and _visible(np.asarray(image)).max() < 64:
        _scale_rgb(image, source)
    turned = ImageOps.exif_transpose(image) if orientation != 1 else image
    followed = size is None or turned.size == size or orientation not in UNTURN or turned.size[::-1] != size
    if not followed:
        turned = turned.transpose(UNTURN[orientation])
    return Decoded(_to_rgb(turned, *_range(image)), mode, orientation, followed, frames)


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args)


def _scale_rgb(image: Image.Image, source: str | Path | BinaryIO) -> None:
    """Scales dark RGB pixels of 16 bits, of which Pillow has read the high bytes only, by the rules of read_image."""
    with open_image(source) as low:
        # In the other byte order the high bytes are the low ones.
        for i, tile in enumerate(low.tile):
            other = _raw_mode(tile)[:-1] + ("L" if _raw_mode(tile)[-1] == "B" else "B")
            low.tile[i] = tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        low.load()
        values = np.asarray(image).astype(np.int32) * 256 + np.asarray(low)
    scaled = Image.fromarray(_to_8_bits(_visible(values), _range(image)[0], False))
    if image.mode == "RGBA":
        scaled.putalpha(image.getchannel("A"))
    image.paste(scaled)


def _visible(pixels: np.ndarray) -> np.ndarray:
    """The colours [H, W, 3] of RGB or RGBA, black where they are not seen at all."""
    return pixels if pixels.shape[2] == 3 else pixels[..., :3] * (pixels[..., 3:] > 0)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 also where it is malformed, since that should not cost the image."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1
    return found if isinstance(found, int) and 2 <= found <= 8 else 1


def _range(image: Image.Image) -> tuple[float, bool]:
    """The largest value that pixels have by the file, 0 where it does not say, and whether 0 is white."""
    # Pillow has scaled these to 16 bits.
    if image.format in ("PPM", "JPEG2000"):
        return 65535, False
    tags: Any = getattr(image, "tag_v2", {})
    bits = int(np.max(tags.get(BITS_PER_SAMPLE, 0)))
    stated = max(float(np.max(tags.get(tag, 0))) for tag in (MAX_SAMPLE, FLOAT_MAX_SAMPLE))
    return stated or (2**bits - 1 if 8 < bits < 16 else 0), tags.get(PHOTOMETRIC) == 0


def _to_rgb(image: Image.Image, largest: float = 0, white_is_zero: bool = False) -> Image.Image:
    """Converts an image of any mode to RGB, 8 bits per channel, by the rules of read_image.

    Args:
        image: upright.
        largest: value that grey pixels of more than 8 bits have by the file; 0: unknown.
        white_is_zero: such pixels are stored inverted.
    Raises:
        one of UNREADABLE.
    """
    if image.mode[0] in "IF":
        return Image.fromarray(_to_8_bits(np.asarray(image), largest, white_is_zero)).convert("RGB")
    if not image.has_transparency_data:
        # Images that are in memory already are not copied; those of files keep their file.
        return image if image.mode == "RGB" and type(image) is Image.Image else image.convert("RGB")
    result = Image.new("RGB", image.size)
    # Strip by strip, as copies of a whole image of four channels take gigabytes.
    rows = max(STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return result


def _to_8_bits(values: np.ndarray, largest: float, white_is_zero: bool) -> np.ndarray:
    """Scales values of pixels to uint8. Raises ValueError for a range that is not known."""
    low, high = float(values.min()), float(values.max())
    # Strip by strip, as copies of a whole image of 32 bits take gigabytes.
    strips = np.array_split(values, min(values.size // STRIP_PIXELS + 1, len(values)))
    if not np.isfinite([low, high]).all():
        raise ValueError("some of its pixels are NaN or infinite")
    limit = max(high, largest)
    # Floats overshoot 0 and 1 where they were resized.
    if values.dtype.kind == "f" and limit < 2:
        top = 1
    # A dark image of 8 bits that were scaled to 16 is no image of 12 or 14 bits.
    elif limit < 65536 and not all(any((strip % step).any() for strip in strips) for step in (257, 256)):
        top = 65535
    else:
        top = next((2**bits - 1 for bits in BITS if limit < 2**bits), 0)
    if not top or low < -top / 10:
        raise ValueError(f"its pixels are {low:g} to {high:g}, should be 0 to 65535 or, of floats, 0 to 1")
    grey = np.empty(values.shape, np.uint8)
    for strip, scaled in zip(strips, np.array_split(grey, len(strips)), strict=True):
        scaled[...] = (strip.astype(np.float32) * (255 / top)).clip(0, 255).round()
    return np.subtract(255, grey, out=grey) if white_is_zero else grey


def read_image(source: str | Path | BinaryIO, size: tuple[int, int] | None = None) -> Image.Image:
    """Reads an image file as RGB, 8 bits per channel.

    - The orientation in EXIF is followed, except where only the stored size fits the annotations.
    - Transparent pixels show white.
    - Pixels of more than 8 bits are scaled from the range that a TIFF states (MaxSampleValue, BitsPerSample), or
      else the smallest that holds them of 8, 10, 12, 14 and 16 bits and, of floats, 0 to 1. Images with other values,
      NaN or infinity are refused.
    - Of animations and several pages the first is read; a warning says so, once in a process.

    Args:
        source: path or open file.
        size: (width, height) that the annotations give; None: EXIF is always followed.
    Raises:
        ImageError: the file does not exist or cannot be decoded.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the image"
    try:
        decoded = decode(source, size)
    except UNREADABLE as error:
        raise image_error(name, error) from error
    if decoded.frames:
        _warn_of_frames()
    return decoded.image


def image_error(name: str, error: BaseException) -> ImageError:
    """The error of an image file, called `name`, that could not be opened or decoded; `error`: one of UNREADABLE."""
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{name}: no such image")
    if isinstance(error, IsADirectoryError):
        return ImageError(
            f"{name}: is a folder, should be an image or a list of images; "
            "the commands dat detect predict and dat classify predict take folders"
        )
    message = f"{name}: cannot be read as an image: {one_line(error)}"
    return ImageError(message, HEIC) if isinstance(error, LacksHeif) else ImageError(message)


@cache
def _warn_of_frames() -> None:
    """Logs a warning, once in a process; of the workers of a loader the first does."""
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        logger.warning("warning: some images are animated or have several pages, of which the first is read")


def check_size(image: Image.Image, name: str | Path = "the image") -> None:
    """Raises ImageError for an image too small or thin to show anything: resized, it may not fit model or memory."""
    short, long = sorted(image.size)
    if short >= SHORTEST_SIDE and long <= LARGEST_ASPECT * short:
        return
    pixels, problem = f"{image.width}x{image.height} pixels", "too small" if short < SHORTEST_SIDE else "too thin"
    limits = f"at least {SHORTEST_SIDE}, the longer side at most {LARGEST_ASPECT} times that"
    message = f"{name}: {pixels} are {problem}; the shorter side should be {limits}"
    raise ImageError(message, f"of {pixels} ({problem})")


def has_contrast(image: Image.Image) -> bool:
    """Whether a channel of an RGB image spans FEW_LEVELS levels, without the 0.1% of pixels at each end."""
    parts = np.array(image.histogram()).reshape(-1, 256).cumsum(1) / (image.width * image.height)
    return bool(((parts > 0.001) & (parts < 0.999)).sum(1).max() >= FEW_LEVELS)


def to_image(source: str | Path | Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Converts a path, image, array or tensor to an RGB image.

    Args:
        source: a path; a PIL image of any mode, whose EXIF orientation is applied; an array [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4] of uint8; or a tensor [1, H, W], [3, H, W] or [4, H, W] of uint8, or of floats 0 to
            1. Four channels are RGB and alpha; transparent pixels show white.

    Raises:
        DataError: none of these, a file that cannot be read, or an image that is too small or thin.
    """
    image = _to_image(source)
    check_size(image, source if isinstance(source, (str, Path)) else "the image")
    return image


def _to_image(source: str | Path | Image.Image | np.ndarray | Tensor) -> Image.Image:
    if isinstance(source, (str, Path)):
        return read_image(source)
    if isinstance(source, Image.Image):
        try:
            return _convert(source).image
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
    return _to_rgb(Image.fromarray(array.squeeze(2) if array.ndim == 3 and channels == 1 else array))
