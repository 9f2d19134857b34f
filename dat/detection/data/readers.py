"""Finds the format of a data set and reads its splits. A format is one file in `formats`, which registers itself."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from dat.detection.config import DataConfig, TrainDataConfig, ValDataConfig
from dat.detection.data.box_checks import WHOLE_KINDS, check_objects
from dat.detection.data.image_names import absent_text, plain_name, suggest_override
from dat.detection.data.objects import check_repeats, image_sizes
from dat.detection.data.records import Annotations, Category, ImageRecord, load_image, merge_classes
from dat.engine.audit import Findings
from dat.utils.errors import DataError
from dat.utils.files import HELD_OUT, is_hidden, path_order, real_paths
from dat.utils.images import open_image

# Images of a split that are opened before training, evenly spaced: those of COCO would take half a minute.
MOST_FILES = 10_000


class Split(NamedTuple):
    """A split as a format found it.

    `name` is shown to the user, such as "train/". `read(problems, images)` reads it and adds its problems to
    `problems`, which may raise at the first that would stop training; `images`: the folder of its images, None: found.
    `anywhere`: the format names files by paths, which may lead out of the folder of the data.
    """

    name: str
    read: Callable[[Findings, Path | None], Annotations]
    anywhere: bool = False


class Found(NamedTuple):
    """The format of a folder, as it is shown to the user, and its splits: "train", "val" and "test", where there."""

    format: str
    splits: dict[str, Split]


class Reader(NamedTuple):
    """One format.

    `find(path)` returns what a folder, or a file of annotations, holds in this format; None: it is of another.
    `layout` says what it looks for. `write`: see Writer; None: the format is only read.
    """

    find: Callable[[Path], Found | None]
    layout: str
    write: "Writer | None"


class Writer(Protocol):
    """Writes the splits of a data set into an empty folder.

    `place(image, path)` puts an image file at `path`. Returns a line for each kind of content that is lost.
    """

    def __call__(
        self, folder: Path, splits: Mapping[str, Annotations], place: Callable[[Path, Path], None]
    ) -> list[str]: ...


READERS: dict[str, Reader] = {}


def register_reader(name: str, find: Callable[[Path], Found | None], layout: str, write: Writer | None = None) -> None:
    """Adds a format; see Reader. Formats are tried in the order in which they were added."""
    READERS[name] = Reader(find, layout, write)


def find_format(path: Path) -> Found:
    """The splits of a folder, or of a file of annotations. Raises DataError where no format recognises it."""
    found = _recognise(path)
    if found:
        return found
    layouts = "; ".join(f"{name}: {reader.layout}" for name, reader in READERS.items())
    if path.is_file():
        raise DataError(f"{path}: is of no known format ({layouts})")
    names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
    holds = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
    inner = path
    # Archives often hold one folder, in which there is everything.
    for _ in range(3):
        folders = [child for child in inner.iterdir() if child.is_dir() and not is_hidden(child.name)]
        if len(folders) == 1:
            (inner,) = folders
            if found := _recognise(inner):
                raise DataError(f"{path} holds {holds}; {inner} is {found.format}: data.root={inner}")
    raise DataError(f"{path} holds {holds}; it should hold data of a known format ({layouts})")


def _recognise(path: Path) -> Found | None:
    found = (reader.find(path) for reader in READERS.values())
    return next((some for some in found if some is not None and some.splits), None)


def existing(folder: Path, *names: str) -> Path | None:
    """The first of these files and folders that exists in `folder`."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_dataset(
    data: DataConfig,
    name: Literal["train", "val"],
    categories: tuple[Category, ...] | None = None,
    annotated: bool = True,
) -> Annotations:
    """Reads and checks a split of a data set, in whichever format it is; its images are in the order of their paths.

    Args:
        data: `data.root` and, where it is not to be found there, `data.NAME.annotations` and `data.NAME.images`.
        name: of the split.
        categories: those of training, which number the classes, by name; None: the split's own.
        annotated: whether images without any annotations, such as COCO's test files list, are an error.

    Raises:
        DataError: a folder of no known format, malformed annotations, no object that could be learnt or found, absent
            images, a class that is not in `categories`.
    """

    def read(problems: Findings) -> Annotations:
        found = read_split(data, name, problems)
        if not found.records:
            raise DataError(f"{found.path}: data.{name} has no images, should have one or more")
        if annotated and not found.annotated:
            raise DataError(f"{found.path}: has no annotations, data.{name} needs them")
        if found.annotated:
            check_objects(found, getattr(data, name), problems)
            # With the classes made one, boxes of several are no mistake.
            if not data.single_class:
                check_repeats(found, problems)
        return found

    return read_strictly(read, categories, partial(suggest_override, Path(data.root), f"data.{name}.images"))


def read_splits(data: DataConfig) -> tuple[Annotations, Annotations]:
    """The splits for training and validation, of the same classes.

    Raises DataError as read_dataset does, and for files that are no images, or of another size than the annotations.
    The `notes` of the splits say what only both show: shared images, and classes of validation only.
    """
    train, val = read_dataset(data, "train"), read_dataset(data, "val")
    # A supercategory may have objects in validation images only.
    train = train.with_categories(val.categories)
    val = require_categories(val, train.categories)
    labels = [{label for r in split.records for label in r.labels[~r.crowd].tolist()} for split in (train, val)]
    if lacking := [train.categories[label].name for label in sorted(labels[1] - labels[0])]:
        count = f"{len(lacking)} class{'es' * (len(lacking) > 1)} of data.val"
        text = f"no training object of {count}, {', '.join(lacking[:10])}{', ...' * (len(lacking) > 10)}"
        train = replace(train, notes=(*train.notes, text))
    trained, evaluated = (real_paths(record.path for record in split.records) for split in (train, val))
    known = set(trained)
    if shared := [os.path.basename(path) for path in evaluated if path in known]:
        text = f"{len(shared)} of {len(val.records)} validation images are training images, such as {shared[0]}"
        val = replace(val, notes=(*val.notes, f"{text}: their AP says little about others"))
    for split in (train, val):
        _check_files(split.records)
    return train, val


def _check_files(records: Sequence[ImageRecord]) -> None:
    """Raises DataError where one of MOST_FILES images cannot be opened, or has another size than annotated."""
    records = records[:: -(-len(records) // MOST_FILES) or 1]
    sizes = image_sizes([record.path for record in records], FirstProblem())
    for record, size in zip(records, sizes, strict=True):
        annotated = record.width, record.height
        if size is not None and size == annotated[::-1]:
            # The annotations may ignore that EXIF turns the image.
            with open_image(record.path) as image:
                size = image.size
        if size != annotated:
            load_image(record.path, annotated)


def read_split(data: DataConfig, name: Literal["train", "val"], problems: Findings) -> Annotations:
    """Reads a split as far as it can be read, and adds its problems to `problems`. Arguments as in read_dataset."""
    root = Path(data.root)
    given: TrainDataConfig | ValDataConfig = getattr(data, name)
    found, split, shared = _find_split(data, name)
    annotations = split.read(problems, root / given.images if given.images else None)
    annotations = arrange(annotations, f"{root}: {found.format}", split)
    if split.anywhere and not data.outside:
        folders = (root, root / given.images, *([(root / given.annotations).parent] if given.annotations else []))
        annotations = keep_inside(annotations, folders, problems)
    if shared:
        records, extent = annotations.records, annotations.extent
        count = f"{len(records) // HELD_OUT} of {len(records)} images"
        rule = f"every {HELD_OUT}th image, by name, is for validation ({count})"
        extent = f"{extent}, no validation split: {rule}"
        if 0 < len(records) < HELD_OUT:
            text = f"{annotations.path}: {extent}, too few; data.val.annotations should name a validation split"
            problems.add("validation split", text, stops=True)
        held = range(HELD_OUT - 1, len(records), HELD_OUT)
        records = tuple(record for i, record in enumerate(records) if (i in held) == (name == "val"))
        annotations = replace(annotations, records=records, extent=extent)
    return merge_classes(annotations) if data.single_class else annotations


def keep_inside(
    annotations: Annotations,
    folders: Sequence[Path],
    problems: Findings,
    advice: str = "data.outside=true allows that",
) -> Annotations:
    """Leaves out images whose names lead outside of all `folders`, as a problem that stops training.

    Links inside a folder are followed, to wherever its owner made them.
    """
    roots = [os.path.join(os.path.abspath(folder), "") for folder in folders]
    inside = []
    for record in annotations.records:
        if os.path.abspath(record.path).startswith(tuple(roots)) or not os.path.exists(record.path):
            inside.append(record)
            continue
        text = f"{annotations.path}: names {record.path}, outside of {folders[0]}; {advice}"
        problems.add("image outside of the data folder", text, stops=True)
    return replace(annotations, records=tuple(inside))


def arrange(annotations: Annotations, shown: str, split: Split) -> Annotations:
    """A whole split with its images in the order of their paths. `shown`: the folder and its format."""
    records = tuple(sorted(annotations.records, key=lambda record: path_order(record.path)))
    return replace(annotations, records=records, format=shown, extent=f"{split.name} {len(records)} images")


def describe_sets(*sets: Annotations) -> str:
    """Where splits were found and in which format, on one line."""
    formats = list(dict.fromkeys(annotations.format for annotations in sets))
    parts = [
        ", ".join([text, *dict.fromkeys(annotations.extent for annotations in sets if annotations.format == text)])
        for text in formats
    ]
    count = len(sets[0].categories)
    return f"{'; '.join(parts)}, {count} class{'es' * (count != 1)}"


def read_strictly(
    read: Callable[[Findings], Annotations],
    categories: tuple[Category, ...] | None = None,
    suggest: Callable[[ImageRecord], str] = lambda record: "",
) -> Annotations:
    """Calls `read`, and raises DataError at the first problem. Arguments as in Split and read_dataset.

    `suggest`: the end of the message that an image is absent.
    """
    problems = FirstProblem()
    found = read(problems)
    if categories is not None:
        found = require_categories(found, categories)
    absent = [record for record in found.records if not os.path.isfile(record.path)]
    if absent:
        if not absent[0].path.parent.is_dir():
            raise DataError(f"{absent[0].path.parent}: no such folder of images{suggest(absent[0])}")
        more = f" (and {len(absent) - 1} more of {len(found.records)})" if len(absent) > 1 else ""
        raise DataError(f"{found.path}: lists {absent_text(absent[0], more)}{suggest(absent[0])}")
    texts = [
        problem.examples[0].removeprefix(f"{found.path}: ")
        if problem.kind in WHOLE_KINDS
        else f"{problem.kind} ({problem.count})"
        for problem in problems.problems.values()
    ]
    return replace(found, warning=f"{found.path}: {'; '.join(texts)}" if texts else "")


def require_categories(found: Annotations, categories: tuple[Category, ...]) -> Annotations:
    """The annotations with the categories of training, by name: in its order, and with those that they lack.

    Ids stay those of `found`. Names may differ in their Unicode form or spaces around them. Raises DataError for a
    category that training does not have.
    """
    found = found.with_categories(categories)
    names = [category.name for category in categories]
    spelling = {plain_name(name): name for name in names}
    found = replace(
        found,
        categories=tuple(
            c if c.name in names else replace(c, name=spelling.get(plain_name(c.name), c.name))
            for c in found.categories
        ),
    )
    own = {category.name: category for category in found.categories}
    if [category.name for category in found.categories] == names:
        return found
    if not own.keys() <= set(names):
        raise DataError(
            f"{found.path}: categories are {_names(found.categories)}; "
            f"they should be those of training, {_names(categories)}"
        )
    used = {category.id for category in (*found.categories, *found.roots)}
    free = itertools.count(max(used | {category.id for category in categories}) + 1)
    missing = {c.name: Category(next(free), c.name) if c.id in used else c for c in categories if c.name not in own}
    extent = f"{found.extent} with {len(own)} of {len(names)} classes" if missing else found.extent
    return replace(found.renumbered(tuple((own | missing)[name] for name in names)), extent=extent)


class FirstProblem(Findings):
    """Raises DataError for the first problem that would stop training, and counts the others."""

    def add(self, kind: str, example: str, stops: bool = False, count: int = 1) -> None:
        if stops:
            raise DataError(example)
        super().add(kind, example, stops, count)


@contextmanager
def collecting(problems: Findings, kind: str) -> Iterator[None]:
    """Turns a DataError inside the block into a problem of this kind that stops training."""
    try:
        yield
    except DataError as error:
        problems.add(kind, str(error), stops=True)


def _find_split(data: DataConfig, name: Literal["train", "val"]) -> tuple[Found, Split, bool]:
    """The format and the split, and whether the split also has the images of the other."""
    root = Path(data.root)
    given: TrainDataConfig | ValDataConfig = getattr(data, name)
    path = root / given.annotations
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.root: {root} {state}; it should be the folder of the data")
    if not path.exists():
        raise DataError(f"{path}: no such annotation file{_hint(root, name)}")
    found = find_format(path)
    splits = found.splits
    if given.annotations and len(splits) == 1:
        return found, next(iter(splits.values())), False
    if name == "train" and "train" in splits:
        both = {"val", "test"}.isdisjoint(splits) and not data.val.annotations
        return found, splits["train"], both and not given.annotations
    if name == "val" and ("val" in splits or "test" in splits):
        return found, splits.get("val") or splits["test"], False
    if name == "val" and "train" in splits and not data.train.annotations:
        return found, splits["train"], True
    there = ", ".join(split.name for split in splits.values())
    raise DataError(f"{path}: {found.format}, has {there} only; data.{name}.annotations should name another split")


def _hint(root: Path, name: str) -> str:
    """Says that the data would be found without the paths given, if it would."""
    try:
        found = find_format(root)
    except DataError:
        return ""
    return f"; {root} is {found.format}, which is read without data.{name}.annotations and data.{name}.images"


def _names(categories: tuple[Category, ...]) -> str:
    shown = ", ".join(f"{c.id} {c.name}" for c in categories[:10])
    return shown + (f" and {len(categories) - 10} more" if len(categories) > 10 else "")
