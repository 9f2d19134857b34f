"""Image and video files that a command is given: files, folders and patterns."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from timm.utils import natural_key

from dat.utils.errors import ConfigError, DataError, one_line
from dat.utils.files import find_images
from dat.utils.images import read_image

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gifv"})
# FFmpeg's names of the containers that hold a video themselves. A playlist under the name of a video could have other
# files and addresses opened.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,asf,gif,image2"


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


def find_media(sources: Sequence[str | Path], exclude: Path | None = None) -> list[Media]:
    """The images and videos of a command, each once, folder by folder in natural order.

    Args:
        sources: files of any kind, folders, of which images and videos are taken, or patterns such as "day*/*.jpg".
        exclude: a folder whose files are left out, such as that of the results, unless it is itself a source.

    Raises:
        DataError: a source that does not exist or holds no images.
    """
    paths: dict[Path, None] = {}
    for source in sources:
        names = [str(source)]
        if glob.has_magic(names[0]) and not Path(source).exists():
            names = sorted(glob.glob(names[0], recursive=True), key=natural_key)
            if not names:
                raise DataError(f"{source}: no file matches this pattern")
        for name in names:
            paths.update(dict.fromkeys(find_images(Path(name), exclude, VIDEO_SUFFIXES)))
    root = Path(sources[0]).absolute()
    if len(sources) > 1 or not root.is_dir():
        root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return [Media(path, path.absolute().relative_to(root).as_posix()) for path in paths]


def read_frames(media: Media, every: int = 1) -> Iterator[Frame]:
    """The image, or every N-th frame of the video, one in memory at a time.

    Raises:
        DataError: a file that cannot be read.
        ConfigError: a video, and PyAV is not installed.
    """
    if not media.is_video:
        yield Frame(media, read_image(media.path))
        return
    try:
        import av
    except ImportError as error:
        raise ConfigError(f'{media.path}: reading videos needs PyAV: pip install "dat-vision[video]"') from error
    empty = True
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        with av.open(str(media.path), options=options) as container:
            for number, frame in enumerate(container.decode(video=0)):
                empty = False
                if number % every == 0:
                    yield Frame(media, frame.to_image(), number)
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise DataError(f"{media.path}: cannot be read as a video: {one_line(error)}") from error
    if empty:
        raise DataError(f"{media.path}: cannot be read as a video: it has no frames")


class Frames:
    """The frames of several files, batch by batch, without those that cannot be read.

    Attributes:
        count: number of frames read so far.
        errors: of the files that could not be read.
    """

    def __init__(self, media: Sequence[Media], every: int) -> None:
        self.media, self.every = media, every
        self.count = 0
        self.errors: list[DataError] = []

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """At most `size` frames at a time, in order. Raises the first error if no frame at all can be read."""
        frames = self._frames()
        while batch := list(islice(frames, size)):
            self.count += len(batch)
            yield batch
        if not self.count:
            raise self.errors[0]

    def _frames(self) -> Iterator[Frame]:
        for one in self.media:
            try:
                yield from read_frames(one, self.every)
            except DataError as error:
                self.errors.append(error)

    def warn(self) -> None:
        """Logs a warning if files could not be read."""
        if self.errors:
            count = f"{len(self.errors)} of {len(self.media)} files"
            logger.warning(f"warning: left out {count} that cannot be read, such as {self.errors[0]}")
