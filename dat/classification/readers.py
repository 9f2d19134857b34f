"""The images of a split and their classes, from a folder, a .tar, or a data set of a library."""

import importlib.util
import os
import posixpath
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data import add_img_extensions, get_img_extensions
from timm.data.readers import create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import natural_key

from dat.classification.config import DataConfig, SplitConfig
from dat.classification.shards import WebReader, check_end, read_records, read_web
from dat.utils.errors import ConfigError, DataError, one_line
from dat.utils.files import HELD_OUT, IMAGE_EXTENSIONS, SPLIT_NAMES, is_hidden, is_image, list_files, real_paths
from dat.utils.images import UNREADABLE, check_size, image_error, read_image

# Endings of files that have to be unpacked.
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")


@dataclass
class Split:
    """Images in any order.

    Attributes:
        reader: item i is (open file, label), `filename(i)` its name, as timm's readers give them.
        class_names: the classes that the split has.
        left_out: files in class folders, relative to the split's folder, that are no images; or parts of shards.
        deep: images in folders of class folders, relative to the split's folder.
        empty: class folders without images.
        note: how the split was chosen, where the configuration does not say; "": it does.
        numbers: the model's class for each label of the reader.
        indices: the images of the reader that belong to the split.
    """

    reader: Any
    class_names: list[str]
    left_out: list[str] = field(default_factory=list)
    deep: list[str] = field(default_factory=list)
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
        labels = reader_labels(self.reader)[self.indices]
        if len(labels) and labels.min() < 0:
            raise DataError(_unlabelled(self.name(int(labels.argmin())), int(labels.min())))
        return np.array(self.numbers)[labels]

    def open(self, index: int) -> tuple[Any, int]:
        """The open file of an image, and its class. Raises one of UNREADABLE."""
        file, label = self.reader[self.indices[index]]
        if label < 0:
            file.close()
            raise DataError(_unlabelled(self.name(index), int(label)))
        return file, self.numbers[int(label)]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as read_image gives it, and its class. Raises one of UNREADABLE."""
        file, label = self.open(index)
        with file:
            image = read_image(file)
        check_size(image)
        return image, label

    def name(self, index: int) -> str:
        """File name of an image, below the split's folder or in its tar."""
        # Data sets of the hub may have none.
        return self.reader.filename(self.indices[index]) or f"image {index}"

    def describe_error(self, index: int, error: BaseException) -> str:
        """One of UNREADABLE, raised for an image, on one line with the image's name."""
        name = self.name(index)
        text = one_line(error if isinstance(error, DataError) else image_error(name, error))
        # The name is asked for after an error alone, since readers of the hub read the image for it.
        return f"{name}: {text.removeprefix('the image: ').removeprefix(f'{name}: ')}"


def _unlabelled(name: str, label: int) -> str:
    return f"{name}: its label is {label}, as in splits of the hub without labels, should be at least 0"


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
        if shared:
            return _hold_out(split, place, name == "val")
        split.note = f"{place} serves as {name}" if place != Path(data.root, settings.path) else ""
        return split
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
    if place.is_dir():
        split = _read_folder(place)
    else:
        # timm supports PNG and JPEG only, and takes no extensions for a .tar.
        add_img_extensions(list(IMAGE_EXTENSIONS - get_img_extensions(as_set=True)))
        try:
            # Opened for each image, so that the workers of a loader have separate positions in the file.
            reader = create_reader("", root=str(place), cache_tarfiles=False)
            _check_rest(reader, place)
            split = _without_hidden(reader)
        except tarfile.TarError as error:
            reason = f"is truncated or damaged: {one_line(error)}; it should be a whole .tar, not compressed"
            raise DataError(f"{key}: {place} {reason}") from error
        # timm reports a tar without images as a ValueError.
        except UNREADABLE as error:
            raise DataError(f"{key}: {place} holds no readable images in class folders") from error
        _check_folders(split.reader, f"{key}: {place}")
    if not len(split):
        raise DataError(f"{key}: {place} holds no readable images in class folders")
    return _number_classes(split, class_names, f"{key}: {place}")


@dataclass
class FolderReader:
    """Image files with labels, as timm's readers give them: item i is (open file, label)."""

    root: str
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self.paths[index], "rb"), self.labels[index]

    def filename(self, index: int) -> str:
        return os.path.relpath(self.paths[index], self.root)


def _read_folder(place: Path) -> Split:
    """The images below a folder's class folders, each with the name of the first folder for its label."""
    root = str(place)
    images: list[str] = []
    left_out: list[str] = []
    for path in list_files(root, follow_links=True):
        if is_image(path):
            images.append(path)
        elif os.path.dirname(path) != root:
            left_out.append(os.path.relpath(path, root))
    images.sort(key=natural_key)
    names = [os.path.relpath(path, root) for path in images]
    classes = [name.partition(os.sep)[0] if os.sep in name else "" for name in names]
    class_names = sorted(set(classes), key=natural_key)
    label = {name: k for k, name in enumerate(class_names)}
    reader = FolderReader(root, images, [label[name] for name in classes])
    split = Split(reader, class_names, sorted(left_out), [name for name in names if name.count(os.sep) > 1])
    folders = {path.name for path in place.iterdir() if path.is_dir() and not is_hidden(path.name)}
    split.empty = sorted(folders - set(class_names))
    return split


def first_class(name: str) -> str:
    """Says which class an image in a folder of a class folder has; `name`: below the split's folder."""
    return f"their class is the first folder, such as {name.partition(os.sep)[0]} of {name}"


def _without_hidden(reader: Any) -> Split:
    """The images of a timm reader of a .tar, without hidden ones and their classes."""
    shown = [not any(map(is_hidden, member.name.split("/"))) for member, *_ in reader.samples]
    reader.samples, targets = reader.samples[shown], reader.targets[shown]
    present, reader.targets = np.unique(targets, return_inverse=True)
    names = {label: name for name, label in reader.class_name_to_idx.items()}
    return Split(reader, [names[label] for label in present])


def _check_rest(reader: Any, place: Path) -> None:
    """Raises tarfile.ReadError where the last image that timm found in a .tar is not the last that it should hold."""
    last = max((tar or member for member, _, tar in reader.samples), key=lambda member: member.offset)
    with tarfile.open(place, "r:") as tar:
        # The header of the first member has been read.
        tar.offset = max(tar.offset, last.offset)
        while tar.next():
            pass
        check_end(tar)


def _check_folders(reader: Any, where: str) -> None:
    """Raises DataError where timm, whose class is the innermost folder in a .tar, makes several folders one class."""
    first: dict[int, tuple[str, str]] = {}
    for (member, _, tar), label in zip(reader.samples, reader.targets.tolist(), strict=True):
        # Tars in a tar are folders of their names.
        name = posixpath.normpath(f"{os.path.splitext(tar.name)[0]}/{member.name}" if tar else member.name)
        folder, known = first.setdefault(label, (posixpath.dirname(name), name))
        if posixpath.dirname(name) != folder:
            raise DataError(
                f"{where} has {known} and {name}; in a .tar the class is the innermost folder, "
                f"{posixpath.basename(folder)!r} of both, and a class should have one folder"
            )


def find_place(data: DataConfig, name: str) -> tuple[Path, bool]:
    """The folder or .tar of a split below `data.root`, and whether it holds the images of both splits.

    It is `data.NAME.path`. Where that is the default, train or val, and not there: the one train.tar or *_train.tar
    (val.tar, *_val.tar). Where this is so for both splits, the root if it has class folders or is a .tar. Else the one
    folder or .tar with another name of the split, such as Training or pets_valid.tar; or the root's one .tar for both.

    Raises:
        DataError: none of these exists; the message lists the folders and tars found.
    """
    root, other = Path(data.root), "val" if name == "train" else "train"
    found = {split: _named_places(root, split, getattr(data, split).path) for split in ("train", "val")}
    if len(found[name]) == 1:
        return found[name][0], False
    default, folders = (data.train.path, data.val.path) == ("train", "val"), set[Path]()
    if default and not any(found.values()):
        folders = _class_folders(root)
        if len(folders) > 1 or root.suffix == ".tar":
            return root, True
    for split, places in found.items():
        if not places and getattr(data, split).path == split:
            found[split] = [path for path in _shown(root) if _is_named(path, split)]
    if len(found[name]) == 1:
        return found[name][0], False
    there = _shown(root)
    tars = [path for path in there if path.suffix == ".tar"]
    if default and not any(found.values()) and len(tars) == 1 and not folders:
        return tars[0], True
    key, place = f"data.{name}.path", root / getattr(data, name).path
    if not root.exists():
        raise DataError(f"data.root: {root} does not exist; it should be the folder of the data")
    if not any(found.values()):
        _check_unpacked(data, name, there)
    if default and not any(found.values()) and (problem := _other_images(root)):
        raise DataError(
            f"{key}: {place} does not exist, and {root} {problem}; folders of classes in data.root should hold the "
            "images themselves, or there should be folders train and val with one folder per class each"
        )
    there = found[name] or there
    names = ", ".join(path.name for path in there[:6]) or "neither folders nor .tar files"
    names += ", ..." if len(there) > 6 else ""
    if default and not any(found.values()) and not tars and (image := _first_images(root)[2]):
        names += f" with images deeper than folders of classes, such as {image}"
    # Only what is named as this split, or a .tar that may be of any, and for validation a test set.
    free = [path for path in there if path not in found[other]]
    tests = [path for path in free if name == "val" and _is_named(path, "test")]
    plain = [path for path in free if path.suffix == ".tar" and not any(_is_named(path, word) for word in SPLIT_NAMES)]
    likely = [*(found[name] and free), *tests, *plain]
    example = f", such as {key}={likely[0].name}" if likely else ""
    raise DataError(
        f"{key}: {place} does not exist, {root} holds {names}; "
        f"{key} should name a folder or a .tar with one folder per class{example}"
    )


def _check_unpacked(data: DataConfig, name: str, there: Sequence[Path]) -> None:
    """Raises DataError where there is only an archive, or only the folder that one was unpacked into."""
    root = Path(data.root)
    for path in () if there else (root, *sorted(root.glob("*"))):
        if path.is_file() and path.name.lower().endswith(ARCHIVES) and not is_hidden(path.name):
            raise DataError(f"data.{name}.path: {path} is an archive; it should be unpacked")
    if len(there) != 1 or there[0].suffix == ".tar" or any(_is_named(there[0], split) for split in SPLIT_NAMES):
        return
    try:
        find_place(replace(data, root=str(there[0])), name)
    except DataError:
        return
    raise DataError(f"data.root: is {root}, should be {there[0]}, the folder in it that has the data")


def _shown(root: Path) -> list[Path]:
    """The visible folders and tars in a folder."""
    paths = sorted(path for path in root.glob("*") if not is_hidden(path.name))
    return [path for path in paths if path.is_dir() or path.suffix == ".tar"]


def _is_named(path: Path, split: str) -> bool:
    """Whether a folder or .tar has one of the names of a split; a .tar may have more before it, as pets_train.tar."""
    if path.suffix == ".tar":
        return path.stem.lower().rpartition("_")[2] in SPLIT_NAMES[split]
    return path.name.lower() in SPLIT_NAMES[split]


def _named_places(root: Path, name: str, path: str) -> list[Path]:
    if (root / path).exists():
        return [root / path]
    found = {*root.glob(f"{name}.tar"), *root.glob(f"*_{name}.tar")} if path == name else ()
    return sorted(place for place in found if not is_hidden(place.name))


def _class_folders(root: Path) -> set[Path]:
    """The folders directly in `root` that hold images; none where images lie elsewhere below it too."""
    folders = set()
    for path in list_files(root, follow_links=True):
        if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS:
            folder = Path(path).parent
            if folder.parent != root:
                return set()
            folders.add(folder)
    return folders


def _first_images(root: Path) -> list[str]:
    """The first image in `root` itself, in a folder in it and deeper; "" where there is none."""
    names: tuple[list[str], ...] = ([], [], [])
    for path in list_files(root, follow_links=True):
        if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS:
            name = os.path.relpath(path, root)
            names[min(name.count(os.sep), 2)].append(name)
    return [min(group, key=natural_key, default="") for group in names]


def _other_images(root: Path) -> str:
    """Names an image in a folder of `root` and one that lies elsewhere; "" if all are in such folders, or none is."""
    outside, inside, deep = _first_images(root)
    if not inside or not (deep or outside):
        return ""
    return f"has {inside}, but {deep} lies deeper" if deep else f"has {inside}, but {outside} outside of folders"


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


def listed_labels(reader: Any) -> np.ndarray | None:
    """The label [n] of every image of a reader that has a list of them: ours, and timm's of tars; None for others."""
    labels = getattr(reader, "labels", getattr(reader, "targets", None))
    return None if labels is None else np.array(labels)


def reader_labels(reader: Any) -> np.ndarray:
    """The label [n] of every image of a reader, without its file where the reader allows it."""
    listed = listed_labels(reader)
    if listed is not None:
        return listed
    # timm's reader of the hub.
    if hasattr(reader, "iter_targets"):
        return np.array(list(reader.iter_targets()))
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
        # macOS writes accents as letters of their own (NFD).
        index = {_composed(name): k for k, name in enumerate(class_names)}
        index |= {name: k for k, name in enumerate(class_names)}
        split.numbers = [index.get(name, index.get(_composed(name), -1)) for name in split.class_names]
        if unknown := [name for name, k in zip(split.class_names, split.numbers, strict=True) if k < 0]:
            raise DataError(
                f"{where} has {len(split.class_names)} classes, {len(unknown)} of them (such as {unknown[0]!r}) not "
                f"among the {len(class_names)} classes of the training data"
            )
        split.class_names = [class_names[k] for k in split.numbers]
    return split


def shared_images(data: DataConfig, train: Split, val: Split) -> int:
    """How many images of `val` are those of `train`: the same files, also by links, or samples of the same data set."""
    if isinstance(train.reader, FolderReader) and isinstance(val.reader, FolderReader):
        # There may be many training images: they are checked for links only if some validation images are links.
        train_paths, val_paths = ([split.reader.paths[index] for index in split.indices] for split in (train, val))
        known = set(real_paths(train_paths, files=any(map(os.path.islink, val_paths))))
        return sum(path in known for path in real_paths(val_paths))
    tars = [split.reader.root for split in (train, val) if isinstance(split.reader, ReaderImageInTar)]
    same = os.path.samefile(*tars) if len(tars) == 2 else data.train == data.val
    return len({*train.indices} & {*val.indices}) if same else 0


def _composed(name: str) -> str:
    """The name in Unicode's form NFC, in which equal names have equal letters."""
    return unicodedata.normalize("NFC", name)


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
