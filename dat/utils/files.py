"""Files that commands read and write: images, JSON and CSV."""

import csv
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm.utils import natural_key

from dat.utils.errors import DataError

IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))  # fmt: skip


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, of the same suffix, which replaces `path` when the block ends.

    An exception inside the block leaves `path` as it was and removes the temporary file.
    """
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Atomically replaces `path` by the content as JSON; a list has one item per line. Raises OSError."""
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(item) for item in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=2) + "\n"
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a file with one JSON object per line, such as log.jsonl; empty if there is no such file."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # A killed run may leave half a line behind.
        with suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Atomically replaces `path` by a table with a header row. Missing values are empty, further keys are ignored."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def file_name(text: str) -> str:
    """Makes a text a valid name of a file or folder on any system."""
    return "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in text).strip() or "_"


def find_images(source: Path, exclude: Path | None = None, more: Collection[str] = ()) -> list[Path]:
    """The file itself, or the images of a folder and its subfolders, in natural order.

    Args:
        source: image file with any extension, or a folder, in which files with one of IMAGE_EXTENSIONS are found.
        exclude: folder inside `source` that is skipped, such as the output folder.
        more: further extensions to find in folders, such as ".mp4".
    Raises:
        DataError: no such file or folder, or a folder without images.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such image or folder")
    extensions = IMAGE_EXTENSIONS.union(more)
    # macOS leaves "._name.jpg" beside name.jpg on other file systems.
    images = [
        path
        for path in source.rglob("*")
        if path.suffix.lower() in extensions and not path.name.startswith("._") and path.is_file()
    ]
    if exclude is not None and source.resolve() in exclude.resolve().parents:
        images = [path for path in images if exclude.resolve() not in path.resolve().parents]
    if not images:
        raise DataError(f"{source}: holds no images ({', '.join(sorted(extensions))})")
    return sorted(images, key=lambda path: (natural_key(str(path)), str(path)))
