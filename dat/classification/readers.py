"""The pictures of a split and their classes: a folder, a .tar, or a data set of a library, in any order."""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from timm.data import add_img_extensions, get_img_extensions
from timm.data.readers import create_reader

from dat.classification.config import DataConfig, SplitConfig
from dat.classification.shards import RecordReader, encoded, index_records, open_web
from dat.utils.errors import ConfigError, DataError, one_line
from dat.utils.files import IMAGE_EXTENSIONS
from dat.utils.images import UNREADABLE, open_image, to_rgb

# of WebDataset
EXTENSIONS = "jpg;jpeg;png;webp"


@dataclass
class Split:
    """Pictures that may be asked for in any order.

    `reader`: timm's, item i is (open file, class index). `class_names`: those that the split has, sorted naturally.
    `left_out`: files in class folders, relative to the split's, that are no pictures; or parts of shards.
    """

    reader: Any
    class_names: list[str]
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Picture `index`, the first frame of an animated one, in RGB, and its class. Raises one of UNREADABLE."""
        file, label = self.reader[index]
        with file, open_image(file) as picture:
            return to_rgb(picture), int(label)

    def name(self, index: int) -> str:
        """File name of a picture, below the split's folder or in its tar."""
        # the hub's data sets need not know one
        return self.reader.filename(index) or f"picture {index}"


def open_split(data: DataConfig, name: Literal["train", "val"], class_names: Sequence[str] | None = None) -> Split:
    """Lists the pictures of one split.

    Args:
        data: `data.NAME.path` is below `data.root`, or names a data set, see SplitConfig.
        name: of the split.
        class_names: those to number the classes by; None takes the split's own, sorted naturally.
    Raises:
        ConfigError: a kind of data set that cannot be read, or not without another package.
        DataError: nothing there, no pictures, pictures outside class folders, or a class not in class_names.
    """
    settings, key = (data.train, "data.train") if name == "train" else (data.val, "data.val")
    scheme = library(settings.path)
    if scheme == "hfids":
        raise ConfigError(
            f"{key}.path is {settings.path!r}: timm reads hfids/ as a stream, in which no order or place can be "
            "chosen, so that a run could not be resumed; it should be a folder, a .tar, hfds/NAME, wds/FOLDER or "
            "tfds/NAME"
        )
    where = f"{key}: {settings.path}"
    if scheme == "wds":
        return _open_web(data, settings, key, class_names)
    if scheme == "hfds":
        return _check_classes(_open_hub(data.root, settings, key, class_names), class_names, where)
    if scheme == "tfds":
        return _check_classes(_open_records(data.root, settings, key, class_names), class_names, where)
    place = Path(data.root) / settings.path
    return open_place(place, f"{key}.path", class_names)


def library(path: str) -> str:
    """Which library's data sets a path names, "hfds", "hfids", "wds" or "tfds"; "" for a folder or .tar."""
    scheme, slash, _ = path.lower().partition("/")
    return scheme if slash and scheme in ("hfds", "hfids", "wds", "tfds") else ""


def open_place(place: Path, key: str, class_names: Sequence[str] | None = None) -> Split:
    """open_split of a folder or .tar. `key`: where it is named, for messages."""
    if not place.exists():
        raise DataError(f"{key}: {place} does not exist; it should be a folder or a .tar with one folder per class")
    if place.is_file() and place.suffix != ".tar":
        raise DataError(f"{key}: {place} is a file that is not a .tar")
    # timm knows PNG and JPEG only, and takes no extensions for a .tar.
    add_img_extensions(list(IMAGE_EXTENSIONS - get_img_extensions(as_set=True)))
    options: dict[str, Any] = {}
    left_out: list[str] = []
    if place.is_dir():
        extensions, left_out = _survey_names(place)
        options["input_key"] = ";".join(sorted(extensions))
    try:
        split = Split(create_reader("", root=str(place), **options), [], left_out)
        split.class_names = _class_names(split.reader)
        checked = _check_classes(split, class_names, f"{key}: {place}")
        if class_names is not None and checked.class_names != list(class_names):
            options["class_map"] = {name: i for i, name in enumerate(class_names)}
            checked.reader = create_reader("", root=str(place), **options)
    except DataError:
        raise
    # timm gives up on a split without pictures in its own way for folders and for tars
    except (RuntimeError, AssertionError, *UNREADABLE) as error:
        raise DataError(f"{key}: {place} holds no readable pictures in class folders") from error
    return checked


def _survey_names(place: Path) -> tuple[set[str], list[str]]:
    """Extensions of files that may be pictures, by name or, for one of them at least, by content; and other files.

    Only of files in class folders; hidden ones are passed over.
    """
    known: set[str] = get_img_extensions(as_set=True)
    others: dict[str, list[str]] = defaultdict(list)
    for folder, _, files in os.walk(place, followlinks=True):
        if Path(folder) != place:
            for file in files:
                extension = os.path.splitext(file)[1].lower()
                if extension not in known and not file.startswith("."):
                    others[extension].append(os.path.join(folder, file))
    found = {extension for extension, files in others.items() if any(map(_is_picture, files))}
    left_out = [os.path.relpath(file, place) for extension in others.keys() - found for file in others[extension]]
    return known | found, sorted(left_out)


def _is_picture(path: str) -> bool:
    try:
        with open_image(path):
            return True
    except UNREADABLE:
        return False


def _open_hub(root: str, settings: Any, key: str, class_names: Sequence[str] | None) -> Split:
    """A map-style data set of the package `datasets`: on the hub, or a folder that it can load."""
    _need("datasets", "datasets", settings, key)
    image_key, label_key = settings.image_key or "image", settings.label_key or "label"
    class_map = None if class_names is None else {name: i for i, name in enumerate(class_names)}
    try:
        reader = create_reader(
            settings.path, root=root or None, split=settings.split, class_map=class_map,
            input_key=image_key, target_key=label_key,
        )  # fmt: skip
        columns = reader.dataset.column_names
        if image_key not in columns or label_key not in columns:
            wanted = f"{image_key!r} (image_key) and {label_key!r} (label_key)"
            raise ValueError(f"its columns are {columns}, should be {wanted}")
        # with a class map the reader knows that alone
        own = reader.dataset.features[label_key].names
        # the package makes a column of nothing where there is none of this name
        if reader.dataset[0][image_key] is None:
            raise ValueError(f"its column {image_key!r} (image_key) holds no pictures, it should")
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise _cannot_load(settings, key, error) from error
    return Split(reader, list(own))


def _need(module: str, package: str, settings: SplitConfig, key: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{key}.path is {settings.path!r}, which needs another package: pip install {package}")


def _cannot_load(settings: SplitConfig, key: str, error: Exception) -> DataError:
    return DataError(f"{key}: cannot load split {settings.split!r} of {settings.path}: {one_line(error)}")


def _open_web(data: DataConfig, settings: SplitConfig, key: str, class_names: Sequence[str] | None) -> Split:
    """WebDataset shards on this machine; timm's reader knows which they are."""
    _need("webdataset", "webdataset", settings, key)
    place = Path(data.root) / settings.path.partition("/")[2]
    # before the package, for which a name may be an address or a command
    if not place.is_dir():
        raise DataError(f"{key}.path: {place} should be a folder of WebDataset shards on this machine")
    names = class_names
    if names is None and data.class_names:
        names = (Path(data.root) / data.class_names).read_text(encoding="utf-8").splitlines()
    try:
        info = create_reader("wds/", root=str(place), split=settings.split).split_info
        paths = [str(place / file) for file in info.filenames]
    # an _info.json may hold anything
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _cannot_load(settings, key, error) from error
    extensions, label_key = (settings.image_key or EXTENSIONS).lower().split(";"), settings.label_key or info.alt_label
    try:
        reader, present, left_out = open_web(paths, info.shard_lengths, extensions, label_key, names)
    except (DataError, OSError) as error:
        raise _cannot_load(settings, key, error) from error
    # all that the file of names has are classes of the model, whether there are pictures of them or not
    return Split(reader, list(names) if names is not None and class_names is None else present, left_out)


def _open_records(root: str, settings: SplitConfig, key: str, class_names: Sequence[str] | None) -> Split:
    """A data set that the package tensorflow_datasets has prepared."""
    # the second is missing from what the first says it needs
    _need("tensorflow_datasets", "tensorflow-datasets importlib_resources", settings, key)
    import tensorflow_datasets as tfds

    image_key, label_key = settings.image_key or "image", settings.label_key or "label"
    left_out: list[str] = []
    try:
        builder = tfds.builder(settings.path.partition("/")[2], data_dir=root or None)
        if not builder.info.splits:
            raise ValueError(f"it is not prepared in {builder.data_dir}; `tfds build` does that")
        split, features = builder.info.splits[settings.split], builder.info.features
        if image_key not in features or label_key not in features or not hasattr(features[label_key], "names"):
            wanted = f"a picture {image_key!r} (image_key) and a class {label_key!r} (label_key)"
            raise ValueError(f"its features are {', '.join(features)}, should be {wanted} among them")
        own = features[label_key].names
        if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
            files = [(str(file.filename), file.skip, file.take) for file in split.file_instructions]
            shards, left_out = index_records(files)
        else:
            shards = builder.as_data_source(split=settings.split, decoders=encoded(image_key))
    # the package raises errors of its own, some of which derive from nothing nearer
    except Exception as error:
        raise _cannot_load(settings, key, error) from error
    index = {name: k for k, name in enumerate(class_names or own)}
    # one that is not among them is refused afterwards
    numbers = [index.get(name, -1) for name in own]
    return Split(RecordReader(shards, features, image_key, label_key, numbers), list(own), left_out)


def _class_names(reader: Any) -> list[str]:
    indices = reader.class_to_idx if hasattr(reader, "class_to_idx") else reader.class_name_to_idx
    return sorted(indices, key=indices.get)


def _check_classes(split: Split, class_names: Sequence[str] | None, where: str) -> Split:
    """The split. Raises DataError for pictures outside class folders and for classes that are not in `class_names`."""
    if not all(split.class_names):
        raise DataError(f"{where} holds pictures outside class folders; it should hold one folder per class")
    unknown = [name for name in split.class_names if class_names is not None and name not in class_names]
    if class_names is not None and unknown:
        raise DataError(
            f"{where} has {len(split.class_names)} classes, {len(unknown)} of them (such as {unknown[0]!r}) not among "
            f"the {len(class_names)} classes of the training data"
        )
    return split
