"""Readers of data sets by name. A format is one file in `formats`, which registers its reader here."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from dat.detection.config import TrainDataConfig
from dat.detection.data.box_checks import BOX_KINDS, check_objects
from dat.detection.data.image_names import absent_text, suggest_override
from dat.detection.data.records import Annotations, Category, ImageRecord
from dat.engine.audit import Findings
from dat.utils.errors import DataError


class Split(Protocol):
    """`data.train` or `data.val` of a configuration; paths are relative to `data.root`."""

    annotations: str
    images: str


class Reader(NamedTuple):
    """A reader of one format.

    `recognises(root, split)` returns whether a folder has this format. `read(root, split, problems)` reads a split and
    adds its problems to `problems`, which may raise at the first that would stop training.
    """

    name: str
    recognises: Callable[[Path, Split], bool]
    read: Callable[[Path, Split, Findings], Annotations]


READERS: dict[str, Reader] = {}


def register_reader(
    name: str,
    recognises: Callable[[Path, Split], bool],
    read: Callable[[Path, Split, Findings], Annotations],
) -> None:
    """Adds a format; see Reader."""
    READERS[name] = Reader(name, recognises, read)


def find_reader(root: Path, split: Split) -> Reader:
    """The first reader that recognises a folder. Raises DataError where none does."""
    for reader in READERS.values():
        if reader.recognises(root, split):
            return reader
    raise DataError(
        f"{root / split.annotations}: no such annotation file, and {root} is of no known format ({', '.join(READERS)})"
    )


def read_dataset(root: Path, split: Split, categories: tuple[Category, ...] | None = None) -> Annotations:
    """Reads and checks a split of the data set in the folder `root`, in whichever format it is.

    Args:
        root: folder of the data set.
        split: where in it the annotations and the images are.
        categories: those that the split must have (a validation split: those of training); None: any.

    Raises:
        DataError: a folder of no known format, malformed annotations, no object that could be learnt or found, absent
            images, other categories.
    """

    def read(problems: Findings) -> Annotations:
        found = find_reader(root, split).read(root, split, problems)
        check_objects(found, split, problems)
        return found

    name = "train" if isinstance(split, TrainDataConfig) else "val"
    return read_strictly(read, categories, partial(suggest_override, root, f"data.{name}.images"))


def read_strictly(
    read: Callable[[Findings], Annotations],
    categories: tuple[Category, ...] | None = None,
    suggest: Callable[[ImageRecord], str] = lambda record: "",
) -> Annotations:
    """Calls `read`, and raises DataError at the first problem. Arguments as in Reader and read_dataset.

    `suggest`: the end of the message that an image is absent.
    """
    problems = FirstProblem()
    found = read(problems)
    if categories is not None:
        found = found.with_categories(categories)
    if categories is not None and found.categories != categories:
        raise DataError(
            f"{found.path}: categories are {_names(found.categories)}; "
            f"they should be those of training, {_names(categories)}"
        )
    absent = [record for record in found.records if not os.path.isfile(record.path)]
    if absent:
        if not absent[0].path.parent.is_dir():
            raise DataError(f"{absent[0].path.parent}: no such folder of images{suggest(absent[0])}")
        more = f" (and {len(absent) - 1} more of {len(found.records)})" if len(absent) > 1 else ""
        raise DataError(f"{found.path}: lists {absent_text(absent[0], more)}{suggest(absent[0])}")
    texts = [
        f"{problem.kind} ({problem.count})"
        if problem.kind in BOX_KINDS
        else problem.examples[0].removeprefix(f"{found.path}: ")
        for problem in problems.problems.values()
    ]
    return replace(found, warning=f"{found.path}: {'; '.join(texts)}" if texts else "")


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


def _names(categories: tuple[Category, ...]) -> str:
    shown = ", ".join(f"{c.id} {c.name}" for c in categories[:10])
    return shown + (f" and {len(categories) - 10} more" if len(categories) > 10 else "")
