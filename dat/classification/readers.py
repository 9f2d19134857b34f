"""The images of a split and their classes, from a folder, a .tar, or a data set of a library."""

import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data import add_img_extensions, get_img_extensions
from timm.data.readers import create_reader

from dat.classification.config import DataConfig, SplitConfig
from dat.classification.shards import WebReader, read_records, read_web
from dat.utils.errors import ConfigError, DataError, one_line
from dat.utils.files import IMAGE_EXTENSIONS
from dat.utils.images import UNREADABLE, open_image, to_rgb

# Without separate splits, every fifth image of each class is held out for validation.
HELD_OUT = 5


@dataclass
class Split:
    """Images in any order.

    Attributes:
        reader: item i is (open file, label), `filename(i)` its name, as timm's readers give them.
        class_names: the classes that the split has.
        left_out: files in class folders, relative to the split's folder, that are no images; or parts of shards.
        empty: class folders without images.
        note: how the split was chosen, where the configuration does not say; "": it does.
        numbers: the model's class for each label of the reader.
        indices: the images of the reader that belong to the split.
    """

    reader: Any
    class_names: list[str]
    left_out: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    note: str = ""
    numbers: Sequence[int] = ()
    indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.numbers, self.indices = range(len(self.class_names)), range(len(self.reader))

    def __len__(self) -> int:
        return len(self.indices)

    def labels(self) -> np.ndarray:
        """The class [n] of every image; no image is decoded."""
        return np.array(self.numbers)[reader_labels(self.reader)[self.indices]]

    def open(self, index: int) -> tuple[Any, int]:
        """The open file of an image, and its class. Raises one of UNREADABLE."""
        file, label = self.reader[self.indices[index]]
        return file, self.numbers[int(label)]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image in RGB, the first frame of an animated one, and its class. Raises one of UNREADABLE."""
        file, label = self.open(index)
        with file, open_image(file) as image:
            return to_rgb(image), label

    def name(self, index: int) -> str:
        """File name of an image, below the split's folder or in its tar."""
        # Data sets of the hub may have none.
        return self.reader.filename(self.indices[index]) or f"image {index}"


# Maps (data, data.train or data.val, the model's class names or None) to (reader, name of each label, left out), see
# Split. Errors other than UserError become a DataError that names the split.
Read = Callable[[DataConfig, SplitConfig, Sequence[str] | None], tuple[Any, list[str], list[str]]]
# {prefix of `data.train.path`, such as "wds" in wds/FOLDER: (reader, packages that it needs)}
READERS: dict[str, tuple[Read, str]] = {}


def register_reader(name: str, read: Read, packages: str = "") -> None:
    """Makes `data.train.path=NAME/...` and `data.val.path=NAME/...` data sets that `read` reads.

    Args:
        name: lower case; folders and .tar files have none.
        read: see Read; its images can be read in any order, by several processes.
        packages: that have to be installed, as pip names them, with blanks between them.
    """
    READERS[name] = (read, packages)


def open_split(data: DataConfig, name: Literal["train", "val"], class_names: Sequence[str] | None = None) -> Split:
    """Lists the images of one split.

    Args:
        data: `data.NAME.path` is below `data.root`, or names a data set, see SplitConfig. Where neither split is there
            under its default name, class folders or a .tar at `data.root` give both, see find_place.
        name: of the split.
        class_names: those to number the classes by; None takes the split's own, sorted naturally.
    Raises:
        ConfigError: a kind of data set that cannot be read, or not without another package.
        DataError: nothing there, no images, images outside class folders, or a class not in class_names.
    """
    settings: SplitConfig = getattr(data, name)
    kind, slash, _ = settings.path.partition("/")
    if not slash or kind.lower() not in READERS:
        place, shared = find_place(data, name)
        split = open_place(place, f"data.{name}.path", class_names)
        return _hold_out(split, place, name == "val") if shared else split
    read, packages = READERS[kind.lower()]
    lacking = [package for package in packages.split() if importlib.util.find_spec(package.replace("-", "_")) is None]
    if lacking:
        needed = " ".join(lacking)
        raise ConfigError(f"data.{name}.path is {settings.path!r}, which needs another package: pip install {needed}")
    try:
        split = Split(*read(data, settings, class_names))
    except ConfigError as error:
        raise ConfigError(f"data.{name}.path is {settings.path!r}: {error}") from error
    # The packages raise errors of many kinds, some of them their own.
    except Exception as error:
        reason = one_line(error)
        raise DataError(f"data.{name}: cannot load split {settings.split!r} of {settings.path}: {reason}") from error
    return _number_classes(split, class_names, f"data.{name}: {settings.path}")


def open_place(place: Path, key: str, class_names: Sequence[str] | None = None) -> Split:
    """open_split of a folder or .tar. `key`: where it is named, for messages."""
    if not place.exists():
        raise DataError(f"{key}: {place} does not exist; it should be a folder or a .tar with one folder per class")
    if place.is_file() and place.suffix != ".tar":
        raise DataError(f"{key}: {place} is a file that is not a .tar")
    # timm supports PNG and JPEG only, and takes no extensions for a .tar.
    add_img_extensions(list(IMAGE_EXTENSIONS - get_img_extensions(as_set=True)))
    options: dict[str, Any] = {}
    left_out: list[str] = []
    if place.is_dir():
        extensions, left_out = _image_extensions(place)
        options["input_key"] = ";".join(sorted(extensions))
    try:
        reader = create_reader("", root=str(place), **options)
    # timm reports a split without images in one way for folders and in another for tars.
    except (RuntimeError, AssertionError, *UNREADABLE) as error:
        raise DataError(f"{key}: {place} holds no readable images in class folders") from error
    indices = reader.class_to_idx if place.is_dir() else reader.class_name_to_idx
    split = Split(reader, sorted(indices, key=indices.get), left_out)
    split.empty = _empty_folders(place, reader, split.class_names) if place.is_dir() else []
    return _number_classes(split, class_names, f"{key}: {place}")


def find_place(data: DataConfig, name: str) -> tuple[Path, bool]:
    """The folder or .tar of a split below `data.root`, and whether it holds the images of both splits.

    It is `data.NAME.path`. Where that is the default, train or val, and not there: the one train.tar or *_train.tar
    (val.tar, *_val.tar); and where this is so for both splits, the root if it has class folders or is a .tar, or the
    one .tar in it.

    Raises:
        DataError: none of these exists; the message lists the folders and tars found.
    """
    root = Path(data.root)
    found = {split: _named_places(root, split, getattr(data, split).path) for split in ("train", "val")}
    if len(found[name]) == 1:
        return found[name][0], False
    if not any(found.values()) and (data.train.path, data.val.path) == ("train", "val"):
        tars, folders = list(root.glob("*.tar")), _class_folders(root)
        if len(folders) > 1 or root.suffix == ".tar":
            return root, True
        if len(tars) == 1 and not folders:
            return tars[0], True
    key, place = f"data.{name}.path", root / getattr(data, name).path
    if not root.exists():
        raise DataError(f"data.root: {root} does not exist; it should be the folder of the data")
    there = found[name] or sorted(path for path in root.glob("*") if path.is_dir() or path.suffix == ".tar")
    names = ", ".join(path.name for path in there[:6]) or "neither folders nor .tar files"
    example = f", such as {key}={there[0].name}" if there else ""
    raise DataError(
        f"{key}: {place} does not exist, {root} holds {names}{', ...' if len(there) > 6 else ''}; "
        f"{key} should name a folder or a .tar with one folder per class{example}"
    )


def _named_places(root: Path, name: str, path: str) -> list[Path]:
    if (root / path).exists():
        return [root / path]
    return sorted({*root.glob(f"{name}.tar"), *root.glob(f"*_{name}.tar")}) if path == name else []


def _class_folders(root: Path) -> list[Path]:
    """The folders directly in `root` that hold images; none where images lie elsewhere below it too."""
    folders = [
        Path(folder)
        for folder, _, files in os.walk(root, followlinks=True)
        if any(os.path.splitext(file)[1].lower() in IMAGE_EXTENSIONS for file in files)
    ]
    return folders if all(folder.parent == root for folder in folders) else []


def _hold_out(split: Split, place: Path, validation: bool) -> Split:
    """Leaves in `split` every fifth image of each class, for validation, or the others, for training."""
    reader, seen = split.reader, Counter[int]()
    indices: list[int] = []
    for index, label in enumerate(reader_labels(reader).tolist()):
        seen[label] += 1
        if (seen[label] % HELD_OUT == 0) == validation:
            indices.append(index)
    held = sum(count // HELD_OUT for count in seen.values())
    rule = f"of each class every {HELD_OUT}th image, by name, is for validation ({held} of {len(reader)} images)"
    split.note = f"{place} has no splits train and val: {rule}"
    if not held:
        raise DataError(f"{split.note}, too few; data.train.path and data.val.path should name a folder or .tar each")
    split.class_names = [split.class_names[k] for k in sorted(seen) if not validation or seen[k] >= HELD_OUT]
    # Files left out are listed once, with the images for training.
    split.indices, split.left_out = indices, [] if validation else split.left_out
    return split


def reader_labels(reader: Any) -> np.ndarray:
    """The label [n] of every image of a reader, without its file where the reader has a list of them."""
    if isinstance(reader, WebReader):
        return reader.labels
    # timm's readers of the hub, of tars and of folders.
    if hasattr(reader, "iter_targets"):
        return np.array(list(reader.iter_targets()))
    if hasattr(reader, "targets"):
        return np.array(reader.targets)
    if hasattr(reader, "samples"):
        return np.array([label for _, label in reader.samples])
    labels = []
    for index in range(len(reader)):
        file, label = reader[index]
        file.close()
        labels.append(int(label))
    return np.array(labels)


def _number_classes(split: Split, class_names: Sequence[str] | None, where: str) -> Split:
    """Numbers the split's classes by `class_names`. Raises DataError for images without a class, or of other ones."""
    if not all(split.class_names):
        raise DataError(f"{where} holds images outside class folders; it should hold one folder per class")
    # WebDataset's labels are numbers of the model already; two of its classes may have the same name.
    if class_names is not None and isinstance(split.reader, WebReader):
        split.class_names = [class_names[k] for k in np.unique(split.reader.labels)]
    elif class_names is not None:
        index = {name: k for k, name in enumerate(class_names)}
        unknown = [name for name in split.class_names if name not in index]
        if unknown:
            raise DataError(
                f"{where} has {len(split.class_names)} classes, {len(unknown)} of them (such as {unknown[0]!r}) not "
                f"among the {len(class_names)} classes of the training data"
            )
        split.numbers = [index[name] for name in split.class_names]
    return split


def _empty_folders(place: Path, reader: Any, class_names: Sequence[str]) -> list[str]:
    """The visible folders directly in `place` below which there is no image."""
    folders = {path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")}
    folders -= set(class_names)
    # Classes may be folders of folders.
    return sorted(folders - {Path(os.path.relpath(file, place)).parts[0] for file, _ in reader.samples if folders})


def _image_extensions(place: Path) -> tuple[frozenset[str], list[str]]:
    """Extensions of image files, including those that only their content identifies, and all other visible files.

    Only files in class folders count.
    """
    others: dict[str, list[str]] = defaultdict(list)
    for folder, _, files in os.walk(place, followlinks=True):
        for file in files:
            extension = os.path.splitext(file)[1].lower()
            if Path(folder) != place and extension not in IMAGE_EXTENSIONS and not file.startswith("."):
                others[extension].append(os.path.join(folder, file))
    found = {extension for extension, files in others.items() if any(map(_is_image, files))}
    left_out = [os.path.relpath(file, place) for extension in others.keys() - found for file in others[extension]]
    return IMAGE_EXTENSIONS | found, sorted(left_out)


def _is_image(path: str) -> bool:
    try:
        with open_image(path):
            return True
    except UNREADABLE:
        return False


def read_hub(
    data: DataConfig, settings: SplitConfig, class_names: Sequence[str] | None
) -> tuple[Any, list[str], list[str]]:
    """A data set of the Hugging Face hub, or a folder that its package `datasets` can load; see Read."""
    image_key, label_key = settings.image_key or "image", settings.label_key or "label"
    reader = create_reader(
        settings.path, root=data.root or None, split=settings.split, input_key=image_key, target_key=label_key
    )
    columns = reader.dataset.column_names
    if image_key not in columns or label_key not in columns:
        wanted = f"{image_key!r} (image_key) and {label_key!r} (label_key)"
        raise ValueError(f"its columns are {columns}, should be {wanted}")
    # timm's cast adds a column of None where there was none of this name.
    if reader.dataset[0][image_key] is None:
        raise ValueError(f"its column {image_key!r} (image_key) holds no images, it should")
    return reader, list(reader.dataset.features[label_key].names), []


def _refuse_stream(data: DataConfig, settings: SplitConfig, class_names: Sequence[str] | None) -> Any:
    raise ConfigError(
        "timm reads hfids/ as a stream, in which no order or place can be chosen, so that a run could not be resumed; "
        "it should be a folder, a .tar, hfds/NAME, wds/FOLDER or tfds/NAME"
    )


register_reader("hfds", read_hub, "datasets")
register_reader("hfids", _refuse_stream)
register_reader("wds", read_web, "webdataset")
# tensorflow-datasets does not declare the second, which it imports.
register_reader("tfds", read_records, "tensorflow-datasets importlib_resources")
