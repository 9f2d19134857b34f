"""Pictures and videos that a command is given: files, folders and patterns."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from timm.utils import natural_key

from dat.utils.errors import ConfigError, DataError
from dat.utils.files import find_images
from dat.utils.images import read_image

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gifv"})
# demuxers, by FFmpeg's names, of files that hold a video themselves
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,asf,gif,image2"


@dataclass(frozen=True)
class Media:
    """A picture or a video.

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
    """A picture in RGB, and its number in its video, from 0; None: it is not of a video."""

    media: Media
    picture: Image.Image
    number: int | None = None

    @property
    def name(self) -> str:
        """Of the file, and for a frame of a video its number, as in "folder/clip.mp4#12"."""
        return self.media.name if self.number is None else f"{self.media.name}#{self.number}"


def find_media(sources: Sequence[str | Path], exclude: Path | None = None) -> list[Media]:
    """The pictures and videos of a command, each once, folder by folder in natural order.

    Args:
        sources: files of any kind, folders, of which pictures and videos are taken, or patterns such as "day*/*.jpg".
        exclude: a folder whose files are left out, such as that of the results, unless it is itself a source.

    Raises:
        DataError: a source that is not there or has nothing.
    """
    paths: dict[Path, None] = {}
    for source in sources:
        paths.update(dict.fromkeys(_expand(str(source), exclude)))
    root = Path(sources[0])
    if len(sources) > 1 or not root.is_dir():
        root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        return [Media(path, path.absolute().relative_to(root).as_posix()) for path in paths]
    return [Media(path, path.relative_to(root).as_posix()) for path in paths]


def read_frames(media: Media, every: int = 1) -> Iterator[Frame]:
    """The picture, or every so many frames of the video, one in memory at a time.

    Raises:
        DataError: a file that cannot be read.
        ConfigError: a video, and nothing is installed that reads videos.
    """
    if not media.is_video:
        yield Frame(media, read_image(media.path))
        return
    count = 0
    for number, picture in _video_reader()(media.path, every):
        count += 1
        yield Frame(media, picture, number)
    if not count:
        raise DataError(f"{media.path}: cannot be read as a video: it has no frames")


class Frames:
    """The frames of media, batch by batch; those that cannot be read are left out.

    Attributes:
        count: of frames that were read so far.
        errors: of the files that could not be read.
    """

    def __init__(self, media: Sequence[Media], every: int) -> None:
        self.media, self.every = media, every
        self.count = 0
        self.errors: list[DataError] = []

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """At most `size` frames at a time, in order."""
        frames = self._frames()
        while batch := list(islice(frames, size)):
            self.count += len(batch)
            yield batch

    def _frames(self) -> Iterator[Frame]:
        for one in self.media:
            try:
                yield from read_frames(one, self.every)
            except DataError as error:
                self.errors.append(error)


def _expand(source: str, exclude: Path | None) -> list[Path]:
    if Path(source).exists() or not glob.has_magic(source):
        return find_images(Path(source), exclude, VIDEO_SUFFIXES)
    found = sorted(glob.glob(source, recursive=True), key=natural_key)
    if not found:
        raise DataError(f"{source}: nothing has such a name")
    return [path for name in found for path in find_images(Path(name), exclude, VIDEO_SUFFIXES)]


Reader = Callable[[Path, int], Iterator[tuple[int, Image.Image]]]


def _video_reader() -> Reader:
    readers: dict[str, Reader] = {"torchcodec": _read_torchcodec, "av": _read_av, "cv2": _read_opencv}
    for module, reader in readers.items():
        if find_spec(module) is not None:
            return reader
    raise ConfigError("reading videos needs one of torchcodec, av (PyAV) and opencv-python: pip install av")


def _read_torchcodec(path: Path, every: int) -> Iterator[tuple[int, Image.Image]]:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder: Any = VideoDecoder(str(path))
        for number in range(0, len(decoder), every):
            yield number, Image.fromarray(decoder[number].permute(1, 2, 0).numpy())
    except (RuntimeError, ValueError, IndexError) as error:
        raise _unreadable(path, error) from error


def _read_av(path: Path, every: int) -> Iterator[tuple[int, Image.Image]]:
    import av

    try:
        # a playlist under the name of a video could have other files and addresses opened
        with av.open(str(path), options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS}) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    yield number, frame.to_image()
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_opencv(path: Path, every: int) -> Iterator[tuple[int, Image.Image]]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        number = 0
        while capture.grab():
            if number % every == 0:
                _, frame = capture.retrieve()
                yield number, Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            number += 1
    except cv2.error as error:
        raise _unreadable(path, error) from error
    finally:
        capture.release()


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as a video: {' '.join(str(error).split())}")
