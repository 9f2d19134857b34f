"""Files that commands read and write: images and JSON."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from timm.utils import natural_key

from dat.utils.errors import ConfigError, DataError
from dat.utils.images import HEIC, UNREADABLE, is_special, lacks_heif, open_image

IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))  # fmt: skip
# Names of the files and folders of a split; some tools, such as CVAT, write them with a capital.
SPLIT_NAMES = {
    "train": ("train", "training", "Train", "Training"),
    "val": ("val", "valid", "validation", "Val", "Valid", "Validation"),
    "test": ("test", "testing", "Test", "Testing"),
}
# Without a validation split, every fifth image is held out.
HELD_OUT = 5
# Names in lower case that systems and programs leave beside data.
SYSTEM_NAMES = frozenset((
    "@eadir", "#recycle", "__macosx", "lost+found", "$recycle.bin", "system volume information", "thumbs.db",
    "desktop.ini",
))  # fmt: skip

# Errors of a full disk, an exhausted quota and a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Temporary files of atomic_write hold the number of their process.
LEFTOVER = re.compile(r"\.(\d+)-[0-9a-f]{8}\.tmp(\.\w+)?$")
# Bytes of a name before its ending, such as "_points.png": names of files have at most 255.
LONGEST_NAME = 240


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, of the same suffix, which replaces `path` when the block ends.

    An exception inside the block leaves `path` as it was and removes the temporary file. The name of the temporary file
    is unique: two processes may write the same file at once. Raises OSError, which names `path` if the disk is full.
    """
    # A name may have 255 bytes.
    temporary = path.with_name(f"{path.stem[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with name_full_disk(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of atomic_write that killed processes left in a folder and its subfolders."""
    for path in folder.rglob("*.tmp*"):
        match = LEFTOVER.search(path.name)
        # The number of this process may have been that of a killed one, as in containers.
        if match and (int(match[1]) == os.getpid() or not process_exists(int(match[1]))):
            path.unlink(missing_ok=True)


def process_exists(number: int) -> bool:
    """Whether a process of this host has the number."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Adds `path`, a file or folder, the free space and the state of old files to the OSError of a full disk."""
    try:
        yield
    except OSError as error:
        # An error that names a file comes from an inner block.
        if error.errno not in FULL or error.filename is not None:
            raise
        raise OSError(error.errno, full_disk(error, path), str(path)) from error


def full_disk(error: OSError, path: Path) -> str:
    """The reason that the file `path`, or a file in the folder `path`, cannot be written."""
    folder = path if path.is_dir() else path.parent
    kept = "finished files are intact" if path == folder else "the old file is kept" if path.exists() else ""
    free = shutil.disk_usage(folder).free / 2**20
    reason = f"{os.strerror(error.errno or 0)}: {free:,.1f} MiB are free in {folder}"
    return f"{reason}; {kept or 'nothing was written'}"


def write_json(path: str | Path, content: Any) -> None:
    """Atomically replaces `path` by the content as JSON; a list has one item per line. Raises OSError."""
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(item) for item in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=2) + "\n"
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """json.loads, also for text of unknown origin. Raises ValueError with one line for everything that it refuses.

    Numbers may be NaN, infinite or, if whole, have up to 4,300 digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deep") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32. Raises DataError for anything else, and OSError."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a file with one JSON object per line, such as log.jsonl; empty if there is no such file."""
    entries = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        # A killed run may leave half a line behind.
        with suppress(ValueError):
            entry = parse_json(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def file_name(text: str) -> str:
    """Makes a text a valid name of a file or folder on any system, to which an ending may be added; see short_name."""
    name = "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in text).strip() or "_"
    return short_name(name, text)


def file_names(texts: Iterable[str]) -> dict[str, str]:
    """The file_name of each text; a hash tells those apart that had to be changed and would share their name."""
    names = {text: file_name(text) for text in texts}
    count = Counter(names.values())
    return {text: name if name == text or count[name] == 1 else _add_hash(name, text) for text, name in names.items()}


class UniqueNames:
    """Names of one text after another; a hash tells apart those that would share a name."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def __call__(self, name: str, text: str) -> str:
        """`name` of `text`, changed if another text has it."""
        return name if self.texts.setdefault(name, text) == text else _add_hash(name, text)


def short_name(name: str, text: str = "") -> str:
    """The name, or if it is longer than LONGEST_NAME its beginning and a hash of the whole, or of `text` if given."""
    return name if len(os.fsencode(name)) <= LONGEST_NAME else _add_hash(name, text or name)


def _add_hash(name: str, text: str) -> str:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    # Part of a letter may be left at the end.
    start = os.fsencode(name)[: LONGEST_NAME - len(digest) - 1].decode(errors="ignore")
    return f"{start}_{digest}"


def real_path(path: str | Path) -> Path:
    """The absolute path without symbolic links. One that leads to itself stays, where Path.resolve may raise."""
    return Path(os.path.realpath(path))


def real_paths(paths: Iterable[str | Path], files: bool = True) -> list[str]:
    """The absolute paths without links to folders, each looked up once, and with `files` without links to files."""
    real = cache(os.path.realpath)
    places = [os.path.join(real(os.path.dirname(path)), os.path.basename(path)) for path in paths]
    return [os.path.realpath(place) if files and os.path.islink(place) else place for place in places]


def check_folder(folder: Path, name: str) -> None:
    """Raises ConfigError, which starts with `name`, if a file or a broken link stands in the way of a folder."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise ConfigError(f"{name}: {place} is a file or a broken link, should be a folder")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or left by a system: ".ipynb_checkpoints", "._1.jpg", "__MACOSX", ..."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_NAMES


def list_files(folder: str | Path, follow_links: bool = False) -> Iterator[str]:
    """The paths of the files in a folder and its subfolders, without hidden ones, in any order.

    Pipes, sockets and devices are no files: to read them may wait forever. Links that lead back to a folder that they
    are in are not followed. Broken links are listed.
    """
    waiting = [(str(folder), False, frozenset[tuple[int, int]]())]
    while waiting:
        place, linked, above = waiting.pop()
        # Folders that cannot be read are passed over, as os.walk does.
        with suppress(OSError), os.scandir(place) as entries:
            status = os.stat(place)
            own = status.st_dev, status.st_ino
            for entry in () if linked and own in above else entries:
                path, link = entry.path, os.path.islink(entry.path)
                if is_hidden(entry.name):
                    continue
                if os.path.isdir(path) if link else entry.is_dir():
                    waiting += [(path, link, above | {own})] if follow_links or not link else []
                elif entry.is_file(follow_symlinks=False) or (link and not is_special(path)):
                    yield path


def is_image(path: str) -> bool:
    """Whether a file has one of IMAGE_EXTENSIONS, or is an image by its content.

    Raw files of cameras are TIFFs, in which Pillow would find the thumbnail: a TIFF of another extension is no image.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return True
    try:
        with open_image(path) as image:
            return image.format != "TIFF" or not extension
    except UNREADABLE:
        return False


def path_order(path: Path) -> Any:
    """Sorts images by their paths, numbers in them as numbers, so that every format gives the same order."""
    return natural_key(str(path)), str(path)


def find_images(source: Path, exclude: Path | None = None, more: Collection[str] = ()) -> tuple[list[Path], list[Path]]:
    """The file itself, or the images in a folder and its subfolders, and the other files there; both in natural order.

    Args:
        source: image file with any extension, or a folder, in which images are found as by is_image.
        exclude: folder inside `source` that is skipped, such as the output folder.
        more: further extensions to find in folders, such as ".mp4".
    Raises:
        DataError: no such file or folder, or a folder without images.
    """
    if source.is_file():
        return [source], []
    if not source.is_dir():
        raise DataError(f"{source}: no such image or folder")
    images: list[Path] = []
    others: list[Path] = []
    skipped = real_path(exclude) if exclude is not None and real_path(source) in real_path(exclude).parents else None
    for path in map(Path, list_files(source)):
        if skipped is not None and skipped in real_path(path).parents:
            continue
        found = path.is_file() and (path.suffix.lower() in more or is_image(str(path)))
        (images if found else others).append(path)
    if not images:
        heic = sum(map(lacks_heif, others))
        hint = f", but {heic} {HEIC}" if heic else f" ({', '.join(sorted(IMAGE_EXTENSIONS.union(more)))})"
        raise DataError(f"{source}: holds no images{hint}")
    for paths in (images, others):
        paths.sort(key=path_order)
    return images, others
