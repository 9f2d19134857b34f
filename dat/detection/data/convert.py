"""Converts data sets between formats."""

import os
import shutil
import tempfile
from pathlib import Path

from dat.detection.data.readers import (
    READERS,
    Split,
    arrange,
    describe_sets,
    find_format,
    keep_inside,
    read_strictly,
    require_categories,
)
from dat.detection.data.records import Annotations
from dat.engine.audit import Findings
from dat.utils.errors import ConfigError, DataError
from dat.utils.progress import progress_bar


def convert_data(source: Path, target: Path, name: str, link: bool = False) -> list[str]:
    """Writes the data set in the folder `source` in another format, with all of its splits.

    Args:
        source: folder in any format.
        target: folder to write, which is absent or empty; it changes only once all is written.
        name: of a format that can be written: coco, yolo or voc.
        link: make symbolic links to the images instead of copies.

    Returns:
        Lines for the user: what was read and written, and what the new format cannot hold.

    Raises:
        DataError: data that cannot be read, or whose images the new format cannot tell apart.
        ConfigError: `target` holds something already, or no such format can be written.
    """
    writer = READERS[name].write if name in READERS else None
    if writer is None:
        writable = ", ".join(name for name, reader in READERS.items() if reader.write is not None)
        raise ConfigError(f"--to is {name}, should be one of {writable}")
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists already, should be absent or an empty folder")
    splits = _read_all(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        with progress_bar(total=sum(len(a.records) for a in splits.values()), unit=" images") as bar:

            def place(image: Path, path: Path) -> None:
                path.parent.mkdir(parents=True, exist_ok=True)
                # COCO's files may list an image twice.
                if link and not path.exists():
                    path.symlink_to(image.resolve())
                elif not link:
                    shutil.copyfile(image, path)
                bar.update()

            lost = writer(folder, splits, place)
        os.replace(folder, target)
    warnings = [f"warning: {annotations.warning}" for annotations in splits.values() if annotations.warning]
    return [describe_sets(*splits.values()), *warnings, *lost, f"written to {target}"]


def _read_all(source: Path) -> dict[str, Annotations]:
    """All splits, which have the same classes."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder of data")
    found = find_format(source)
    splits = {
        name: arrange(_read_one(source, split), f"{source}: {found.format}", split)
        for name, split in found.splits.items()
    }
    # A supercategory may have objects in one of them only.
    first, *_ = splits.values()
    first = first.with_categories(category for split in splits.values() for category in split.categories)
    return {name: require_categories(split, first.categories) for name, split in splits.items()}


def _read_one(source: Path, split: Split) -> Annotations:
    def read(problems: Findings) -> Annotations:
        annotations = split.read(problems, None)
        if not split.anywhere:
            return annotations
        return keep_inside(annotations, (source,), problems, "convert never reads there")

    return read_strictly(read)
