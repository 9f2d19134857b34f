"""The image files that annotations name, also where another machine or tool wrote the names."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from dat.detection.data.records import ImageRecord
from dat.engine.audit import Findings
from dat.utils.files import IMAGE_EXTENSIONS, list_files

# Folders below data.root in which a missing image is looked for.
MOST_FOLDERS = 10_000


def find_files(folder: Path, names: Sequence[str], problems: Findings, source: Path) -> list[Path]:
    """The file of each name, always below `folder`; a file that is absent gets the path `folder`/last part.

    Names are paths relative to `folder`. Any other (with a folder too many, of another machine or system, a URL,
    percent-encoded, of another case or Unicode form) is the file whose name is its last part; of several files the one
    in whose path most folders of the name stand. Names that lead outside are searched for likewise, not followed.

    Args:
        folder: of the images; read only if a name is no path in it.
        names: as the annotations give them.
        problems: gets names that fit several files, and different names of one file.
        source: annotations, for the messages.
    """
    index = _Index(folder)
    paths = []
    for name in names:
        found = [name] if index.has(name) else index.search(name)
        if len(found) > 1:
            text = f"{source}: the image {name} may be {folder / found[0]} or {folder / found[1]}"
            text = f"{text}; the folder of images should hold only one of them"
            problems.add("several files of an image's name", text, stops=True)
        paths.append(folder / (found[0] if found else _parts(name)[-1]))
    if len(set(paths)) < len(paths):
        _find_shared(names, paths, problems, source)
    return paths


def absent_text(record: ImageRecord, more: str = "") -> str:
    """A message that an image is absent; `more`: a remark on others."""
    path, name = record.path, record.file_name or record.path.name
    tried = path.parent / name
    reason = f"{tried} leads outside it" if os.path.exists(tried) else f"there is no {tried}"
    if broken := broken_link(path):
        reason = f"{path} {broken}"
    return f"the image {name}, which is absent from {path.parent}{more}: {reason}"


def broken_link(path: Path) -> str:
    """A text for a link whose file is not there; "" for any other path."""
    return f"is a broken link to {os.readlink(path)}" if os.path.islink(path) and not os.path.exists(path) else ""


def suggest_override(root: Path, key: str, record: ImageRecord) -> str:
    """The end of a message that an image is absent: a value of `key` with which it would be found below `root`."""
    name = record.file_name or record.path.name
    # A name that leads outside of the folder of images.
    if os.path.isabs(name) and os.path.isfile(name):
        return f"; {key}={os.path.dirname(name)} has it"
    for folder, _, files in islice(os.walk(root), MOST_FOLDERS):
        for parts in _readings(name):
            for file in files:
                if _key(file) == _key(parts[-1]) and os.path.isfile(os.path.join(folder, file)):
                    path = Path(os.path.relpath(folder, root), file)
                    same = _common(path.parts, parts)
                    return f"; {key}={Path(*path.parts[: len(path.parts) - same]).as_posix()} has it"
    return ""


class ImagesByStem:
    """Image files below a folder, for annotation files that are named as their images are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [path for path in sorted(map(Path, list_files(folder))) if path.suffix.lower() in IMAGE_EXTENSIONS]
        self._by_stem, self._named = {path.with_suffix(""): path for path in files}, set(files)

    def find(self, annotations: Path, name: str) -> Path:
        """The image of annotations with this path below a like folder, which call it `name`, in the same subfolder.

        Names that tools give often fit no file; of several images of the same stem, the name tells which.
        """
        stem = self.folder / annotations.with_suffix("")
        given = stem.parent / _parts(name)[-1] if name else stem
        if given.stem == stem.name and given in self._named:
            return given
        return self._by_stem.get(stem, self.folder / given.name)


class _Index:
    """The files of a folder; links to other folders are not followed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._inside: dict[str, bool] = {}

    def has(self, name: str) -> bool:
        """Whether the name is the path of a file below the folder."""
        leads_up = ".." in name and ".." in _parts(name)
        if leads_up or os.path.isabs(name) or not os.path.isfile(os.path.join(self.folder, name)):
            return False
        parent = os.path.dirname(name)
        if parent not in self._inside:
            real, root = (os.path.realpath(path) for path in (os.path.join(self.folder, parent), self.folder))
            self._inside[parent] = os.path.commonpath((real, root)) == root
        return self._inside[parent]

    def search(self, name: str) -> list[str]:
        """The files, relative to the folder, that fit a name equally well."""
        for parts in _readings(name):
            files = self._by_name.get(_key(parts[-1]), ())
            scores = [(_common(file.split("/"), parts), file.split("/")[-1] == parts[-1]) for file in files]
            if files:
                return [file for file, score in zip(files, scores, strict=True) if score == max(scores)]
        return []

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in files:
                found[_key(file)].append(Path(os.path.relpath(folder, self.folder), file).as_posix())
        return found


def _readings(name: str) -> Iterator[list[str]]:
    """The parts of a name: as it stands, without the query of a URL, and with percent-encoding decoded."""
    names = [name, re.split(r"[?#]", name)[0]] if "://" in name else [name]
    # Label Studio's local files are /data/local-files/?d=PATH.
    names += name.split("?d=")[1:]
    for text in dict.fromkeys([*names, *map(unquote, names)]):
        yield _parts(text)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[/\\]", name) if part] or [""]


def plain_name(name: str) -> str:
    """A name in one Unicode form, of several that look the same, and without spaces around it."""
    return unicodedata.normalize("NFC", name.strip())


def _key(part: str) -> str:
    return plain_name(part).casefold()


def _common(file: Sequence[str], name: Sequence[str]) -> int:
    """How many of the last parts of two paths are equal."""
    pairs = zip(reversed(file), reversed(name), strict=False)
    return next((i for i, pair in enumerate(pairs) if _key(pair[0]) != _key(pair[1])), min(len(file), len(name)))


def _find_shared(names: Sequence[str], paths: Sequence[Path], problems: Findings, source: Path) -> None:
    by_path: dict[Path, set[str]] = defaultdict(set)
    for name, path in zip(names, paths, strict=True):
        by_path[path].add(name)
    for path, different in by_path.items():
        if len(different) > 1 and os.path.isfile(path):
            first, second, *_ = sorted(different)
            text = f"{source}: the images {first} and {second} are one file, {path}"
            problems.add("one file of several images", text, stops=True)
