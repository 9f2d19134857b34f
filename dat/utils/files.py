"""Files that commands read and leave behind: pictures and JSON."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm.data import add_img_extensions, get_img_extensions
from timm.utils import natural_key

from dat.utils.errors import DataError

# timm's own are those of PNG and JPEG alone
add_img_extensions([".bmp", ".gif", ".jfif", ".jp2", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp", ".avif"])


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, of the same suffix, to write to; it takes the place of `path` at the end.

    Whatever is raised inside leaves `path` as it was, and no temporary file behind.
    """
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Replaces `path` by the content as JSON, a list with an item per line; a crash leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written; no temporary file stays behind.
    """
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(item) for item in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=2) + "\n"
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, none where there is no such file."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # a killed run may leave half a line behind
        with suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def find_images(source: Path, exclude: Path | None = None, more: Collection[str] = ()) -> list[Path]:
    """The file itself, or the images of a folder and of the folders in it, in natural order.

    Args:
        source: an image file of any kind, or a folder, of which files with timm's image extensions are taken.
        exclude: folder inside `source` whose files are left out, such as that of the results.
        more: further extensions, such as ".mp4", of which files of a folder are taken.
    Raises:
        DataError: no such file or folder, or a folder without images.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such image or folder")
    extensions = get_img_extensions(as_set=True).union(more)
    # "._name.jpg" is what macOS leaves beside name.jpg on foreign disks
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
