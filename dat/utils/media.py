"""Image and video files that a command is given: files, folders and patterns."""

import glob
import math
import os
import struct
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.utils import natural_key

from dat.utils.errors import ConfigError, DataError, ImageError, TooManyFilesError, one_line
from dat.utils.files import find_images
from dat.utils.images import HEIC, check_size, lacks_heif, read_image

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".asf", ".gifv", ".3gp", ".ts", ".mts",
    ".m2ts", ".vob", ".flv",
))  # fmt: skip
# FFmpeg's names of the containers that hold a video themselves. A playlist under the name of a video could have other
# files and addresses opened.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,asf,flv,gif,image2"
# Of a frame of a video: Pillow's limit for images. A video of a few kilobytes may state sizes that fill the memory.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)
# The reason to leave out other files; see ImageError.
NO_IMAGE = "of no image format"
# Part of the duration that it states which a whole video has at least.
WHOLE = 0.9
# Pixels beyond which a batch takes no further frame.
BATCH_PIXELS = 2**26
# How images are turned by display matrices (a, b, c, d): x' = ax + cy and y' = bx + dy, where y points down.
TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Media:
    """An image or a video.

    Attributes:
        path: of the file.
        name: of the file, relative to the folder that all files of a command are in, with "/".
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """An image in RGB; `number` from 0 if it is a frame of a video."""

    media: Media
    image: Image.Image
    number: int | None = None

    @property
    def name(self) -> str:
        """The name of the file; of a frame "folder/clip.mp4#12"."""
        return self.media.name if self.number is None else f"{self.media.name}#{self.number}"

    @property
    def origin(self) -> dict[str, Any]:
        """The columns of result tables that say where an image is from."""
        return {"file_name": self.media.name} | ({} if self.number is None else {"frame": self.number})


def find_media(sources: Sequence[str | Path], exclude: Path | None = None) -> tuple[list[Media], list[Media]]:
    """The images and videos of a command, and the other files in its folders, each once, in natural order.

    Args:
        sources: files of any kind, folders, of which images and videos are taken, or patterns such as "day*/*.jpg".
        exclude: a folder whose files are left out, such as that of the results, unless it is itself a source.

    Raises:
        DataError: a source that does not exist or holds no images.
    """
    paths: dict[Path, None] = {}
    others: dict[Path, None] = {}
    for source in sources:
        names = [str(source)]
        if glob.has_magic(names[0]) and not Path(source).exists():
            names = sorted(glob.glob(names[0], recursive=True), key=natural_key)
            if not names:
                raise DataError(f"{source}: no file matches this pattern")
        for name in names:
            for group, found in zip((paths, others), find_images(Path(name), exclude, VIDEO_SUFFIXES), strict=True):
                group.update(dict.fromkeys(found))
    root = Path(sources[0]).absolute()
    if len(sources) > 1 or not root.is_dir():
        root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    named = {path: Media(path, os.path.relpath(path, root).replace(os.sep, "/")) for path in [*paths, *others]}
    return [named[path] for path in paths], [named[path] for path in others if path not in paths]


def read_frames(media: Media, every: int = 1) -> Generator[Frame, None, str]:
    """The image, or every N-th frame of the video, one in memory at a time.

    The rotation and mirroring that a video states, as phones' do, are followed. The generator returns how much there is
    of a video that was cut off, such as "5.6 of 10.0 seconds", where the file states its duration; else "".

    Raises:
        ImageError: a file that cannot be read, or an image or frame that is too small or too large.
        ConfigError: a video, and PyAV is not installed.
    """
    if not media.is_video:
        image = read_image(media.path)
        check_size(image, media.path)
        yield Frame(media, image)
        return ""
    try:
        import av
    except ImportError as error:
        raise ConfigError(f'{media.path}: reading videos needs PyAV: pip install "dat-vision[video]"') from error
    empty, end, stated = True, math.inf, 0
    try:
        # FFmpeg decodes a frame of each stream to learn about it.
        limit = {"max_pixels": str(MOST_PIXELS)}
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS, **limit}
        # Part of a relative path may look like a protocol.
        with av.open(os.path.abspath(media.path), options=options) as container:
            if not container.streams.video:
                raise ImageError(f"{media.path}: cannot be read as a video: it holds no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ImageError(f"{media.path}: cannot be read as a video: there is no decoder for it")
            stream.codec_context.options = limit
            for number, frame in enumerate(container.decode(stream)):
                empty = False
                # In units of time_base. Where the frames do not say when they end, the video counts as whole.
                duration = getattr(frame, "duration", None)
                end = frame.pts + duration if frame.pts is not None and duration else math.inf
                if number % every == 0:
                    image = _turn(frame)
                    check_size(image, f"{media.path}: frame {number}")
                    yield Frame(media, image, number)
            # Without a number of frames, as in most containers but AVI and MP4, the duration is an estimate. Times are
            # compared, since frames may be absent from the file (AVI) or not be shown (MP4). FFmpeg shortens the
            # duration of a truncated AVI, whose unit of time is a frame.
            if stream.frames:
                stated = stream.frames if container.format.name == "avi" else stream.duration or 0
            seconds = float(stream.time_base or 0)
    except av.error.ArgumentError as error:
        # FFmpeg's error for too many pixels says no more.
        message = f"it cannot be decoded, or its frames have more than {MOST_PIXELS} pixels"
        raise ImageError(f"{media.path}: cannot be read as a video: {message}") from error
    except ImageError:
        raise
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        TooManyFilesError.check(error)
        raise ImageError(f"{media.path}: cannot be read as a video: {one_line(error)}") from error
    if empty:
        raise ImageError(f"{media.path}: cannot be read as a video: it has no frames")
    return f"{end * seconds:.1f} of {stated * seconds:.1f} seconds" if end < WHOLE * stated else ""


def _turn(frame: Any) -> Image.Image:
    """A frame of PyAV as players show it: turned by multiples of 90 degrees, mirrored."""
    image: Image.Image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # Three rows of three fixed-point numbers, of which the first two columns turn.
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    scale = max(map(abs, (a, b, c, d))) or 1
    turn = TURNS.get((round(a / scale), round(b / scale), round(c / scale), round(d / scale)))
    return image if turn is None else image.transpose(turn)


class Frames:
    """The frames of several files, batch by batch, without those that cannot be used.

    Attributes:
        media: the images and videos.
        total: number of images; None if there are videos, whose frames are not known.
        count: number of frames read so far.
        left_out: the files that are not used, by reason; `others` are among them from the start.
        cut_off: the videos that end before they should, each with how much there is of it.
    """

    def __init__(self, media: Sequence[Media], others: Sequence[Media], every: int) -> None:
        self.media, self.every = media, every
        self.total = None if any(one.is_video for one in media) else len(media)
        self.count = 0
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.cut_off: list[str] = []
        self._error: ImageError | None = None
        for other in others:
            self.left_out[HEIC if lacks_heif(other.path) else NO_IMAGE].append(other.name)

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """At most `size` frames at a time, fewer of large ones, in order.

        Raises the first error if no frame at all can be read.
        """
        batch, pixels = list[Frame](), 0
        for frame in self._frames():
            batch.append(frame)
            pixels += frame.image.width * frame.image.height
            self.count += 1
            if len(batch) == size or pixels >= BATCH_PIXELS:
                yield batch
                # Before the next frame is read: one may take gigabytes.
                del frame
                batch, pixels = [], 0
        if batch:
            yield batch
        if not self.count and self._error is not None:
            raise self._error

    def _frames(self) -> Iterator[Frame]:
        for one in self.media:
            try:
                if part := (yield from read_frames(one, self.every)):
                    self.cut_off.append(f"{one.name} (it ends after {part})")
            except ImageError as error:
                self._error = self._error or error
                cause = f" ({one_line(error.__cause__, 80)})" if error.__cause__ and error.reason != HEIC else ""
                self.left_out[error.reason].append(one.name + cause)

    def summary(self) -> str:
        """A line such as "12 images, 1 left out: 1 of 1x1 pixels (too small): dot.png"; "" if nothing is."""

        def group(names: Sequence[str], reason: str) -> str:
            return f"{len(names)} {reason}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"

        groups = [group(names, reason) for reason, names in self.left_out.items()]
        total = sum(map(len, self.left_out.values()))
        parts = [f"{total} left out: {'; '.join(groups)}"] if groups else []
        if self.cut_off:
            parts.append(group(self.cut_off, "cut off"))
        return f"{self.count} images, {'; '.join(parts)}" if parts else ""
