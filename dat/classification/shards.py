"""Samples in shards on this machine, read in any order: tars of WebDataset and records of TensorFlow Datasets.

timm's readers of both only stream: their evaluation drops and repeats samples under several processes, unreadable
samples have no name, and no place of an epoch can be resumed. Here an index of where samples begin is made once, when a
split is opened, and each sample is read from its place.
"""

import logging
import os
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers import create_reader
from timm.data.readers.targets import get_field
from timm.utils import natural_key

from dat.classification.config import DataConfig, SplitConfig
from dat.utils.errors import DataError
from dat.utils.files import is_hidden, parse_json

# WebDataset's extensions of images, where the configuration names none.
EXTENSIONS = "jpg;jpeg;png;webp"


class Shards:
    """The bytes of samples: sample i is `size` bytes from byte `start` of a shard, `places[i]` = (shard, start, size).

    Raises OSError for shards that were removed since.
    """

    def __init__(self, paths: Sequence[str], places: Sequence[tuple[int, int, int]]) -> None:
        self.paths, self.places = list(paths), np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> bytes:
        shard, start, size = self.places[index].tolist()
        # Opened for each sample, as image files are, so that workers and threads have separate file positions.
        with open(self.paths[shard], "rb") as file:
            file.seek(start)
            return file.read(size)

    def shard(self, index: int) -> str:
        """File name of the shard of a sample."""
        return os.path.basename(self.paths[self.places[index, 0]])


@dataclass
class WebReader:
    """Samples of WebDataset shards as timm's readers give them: item i is (open file, label)."""

    shards: Shards
    labels: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        return BytesIO(self.shards[index]), int(self.labels[index])

    def filename(self, index: int) -> str:
        return f"{self.shards.shard(index)}/{os.fsdecode(self.keys[index])}"


def read_web(
    data: DataConfig, settings: SplitConfig, class_names: Sequence[str] | None
) -> tuple[WebReader, list[str], list[str]]:
    """WebDataset shards, uncompressed tars, in a folder of this machine; see dat.classification.readers.Read.

    A class is the number in KEY.cls, or the number or text in the field `label_key` of KEY.json. Samples of negative
    numbers are left out, as in timm.
    """
    place = Path(data.root) / settings.path.partition("/")[2]
    # Checked before webdataset sees the name, which it may take for an address or a command.
    if not place.is_dir():
        raise DataError(f"{place} should be a folder of WebDataset shards on this machine")
    if class_names is None and data.class_names:
        class_names = (Path(data.root) / data.class_names).read_text(encoding="utf-8").splitlines()
    # timm warns where there is no _info.json, which a pattern in `split` does not need.
    logger = logging.getLogger("timm.data.readers.reader_wds")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        info = create_reader("wds/", root=str(place), split=settings.split).split_info
    finally:
        logger.setLevel(level)
    paths = [str(place / name) for name in info.filenames]
    lengths = info.shard_lengths if len(info.shard_lengths) == len(paths) else [0] * len(paths)
    extensions, label_key = (settings.image_key or EXTENSIONS).lower().split(";"), settings.label_key or info.alt_label
    samples: list[tuple[tuple[int, int, int], int | str, bytes]] = []
    left_out: list[str] = []
    for shard, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        count = 0
        with open(path, "rb") as file:
            for key, members in _samples(path, left_out):
                count += 1
                image = next((members[extension] for extension in extensions if extension in members), None)
                label = _label(file, members, label_key)
                if image is None or label is None:
                    left_out.append(f"{os.path.basename(path)}/{key}")
                elif isinstance(label, str) or label >= 0:
                    samples.append(((shard, *image), label, os.fsencode(key)))
        if count < length:
            left_out.append(f"{os.path.basename(path)}: {count} of the {length} samples that it should hold")
    if not samples:
        wanted = f"an image ({', '.join(extensions)}) and a class ({f'{label_key} of json' if label_key else 'cls'})"
        raise ValueError(f"no sample with {wanted}" + (f"; left out: {left_out[0]}" if left_out else ""))
    places, labels, keys = zip(*samples, strict=True)
    numbers, names = number_labels(labels, class_names)
    return WebReader(Shards(paths, places), numbers, np.array(keys)), names, left_out


def _samples(path: str, left_out: list[str]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and {extension: (first byte, size)} of each sample, consecutive files of one name before its first dot.

    Hidden files are passed over. A damaged rest of the shard is added to `left_out`.
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(path, "r:") as tar:
            shown = (member for member in tar if member.isreg() and not any(map(is_hidden, member.name.split("/"))))
            files = ((*base_plus_ext(member.name), member) for member in shown)
            for key, members in groupby(files, key=lambda file: file[0]):
                if key is not None:
                    yield key, {ext.lower(): (member.offset_data, member.size) for _, ext, member in members}
            check_end(tar)
    except (tarfile.TarError, OSError) as error:
        left_out.append(f"{os.path.basename(path)}: {error}")


def check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless a block of zeros, as at the end of every .tar, follows the members that were found.

    tarfile itself ends without an error at a header that is damaged or not there.
    """
    file: Any = tar.fileobj
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    if any(block):
        raise tarfile.ReadError(f"no tar from byte {tar.offset} on")


def _label(file: Any, members: dict[str, tuple[int, int]], label_key: str) -> int | str | None:
    """The class of a sample; None without one that can be read."""
    place = members.get("json" if label_key else "cls")
    if place is None:
        return None
    file.seek(place[0])
    content = file.read(place[1])
    try:
        label = get_field(parse_json(content), label_key) if label_key else content
        return label if isinstance(label, str) else int(label)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None


def number_labels(labels: Sequence[int | str], class_names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Class numbers [n] of labels, which are numbers or class names, and the class names.

    `class_names` None: they are the texts that occur, or the numbers up to the largest. Raises ValueError for numbers
    and texts mixed, and for a class that `class_names` lacks.
    """
    if len({type(label) for label in labels}) > 1:
        raise ValueError("some classes are numbers and some are texts, should be one or the other")
    present: list[Any] = sorted(set(labels), key=lambda label: natural_key(str(label)))
    last = present[-1]
    if class_names is None and not isinstance(last, str) and last >= len(labels):
        raise ValueError(f"class {last} of {len(labels)} samples; data.class_names should name a file")
    names = class_names or (present if isinstance(last, str) else [str(k) for k in range(last + 1)])
    number: dict[Any, int] = {name: k for k, name in enumerate(names if isinstance(last, str) else range(len(names)))}
    unknown = [label for label in present if label not in number]
    if unknown:
        raise ValueError(f"class {unknown[0]!r} is not among the {len(names)} of the training data")
    return np.array([number[label] for label in labels]), list(names)


@dataclass
class RecordReader:
    """Samples of TensorFlow Datasets as timm's readers give them; TensorFlow itself is not needed.

    Attributes:
        shards: the records, or the package's own data source where its files are not TFRecords.
        features: those of the data set; `image_key` and `label_key` are an image and a class among them.
    """

    shards: Any
    features: Any
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        sample = self.shards[index]
        if isinstance(sample, bytes):
            sample = self.features.deserialize_example_np(sample, decoders=encoded(self.image_key))
        return BytesIO(bytes(sample[self.image_key])), int(sample[self.label_key])

    def filename(self, index: int) -> str:
        place = f", in {self.shards.shard(index)}" if isinstance(self.shards, Shards) else ""
        return f"record {index} of the split{place}"


def read_records(
    data: DataConfig, settings: SplitConfig, class_names: Sequence[str] | None
) -> tuple[RecordReader, list[str], list[str]]:
    """A data set that the package tensorflow_datasets has prepared; see dat.classification.readers.Read."""
    import tensorflow_datasets as tfds

    image_key, label_key = settings.image_key or "image", settings.label_key or "label"
    left_out: list[str] = []
    builder = tfds.builder(settings.path.partition("/")[2], data_dir=data.root or None)
    if not builder.info.splits:
        raise ValueError(f"it is not prepared in {builder.data_dir}; `tfds build` does that")
    split, features = builder.info.splits[settings.split], builder.info.features
    if image_key not in features or label_key not in features or not hasattr(features[label_key], "names"):
        wanted = f"an image {image_key!r} (image_key) and a class {label_key!r} (label_key)"
        raise ValueError(f"its features are {', '.join(features)}, should be {wanted} among them")
    if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
        files = [(str(file.filename), file.skip, file.take) for file in split.file_instructions]
        shards, left_out = index_records(files)
    else:
        shards = builder.as_data_source(split=settings.split, decoders=encoded(image_key))
    return RecordReader(shards, features, image_key, label_key), list(features[label_key].names), left_out


def encoded(image_key: str) -> dict[str, Any]:
    """Decoders of TensorFlow Datasets that leave an image as the bytes of its file."""
    import tensorflow_datasets as tfds

    return {image_key: tfds.decode.SkipDecoding()}


def index_records(files: Sequence[tuple[str, int, int]]) -> tuple[Shards, list[str]]:
    """Finds the records of TFRecord files, each a little-endian size of 8 bytes, 4 bytes, content, 4 bytes.

    Args:
        files: (path, records to pass over, records to take).

    Returns:
        the records, and a text for each file that ends early.
    """
    places: list[tuple[int, int, int]] = []
    left_out = []
    for shard, (path, skip, take) in enumerate(files):
        end, start, count = os.path.getsize(path), 0, 0
        with open(path, "rb") as file:
            while count < skip + take and start + 12 <= end:
                file.seek(start)
                (size,) = struct.unpack("<Q", file.read(8))
                if start + 12 + size > end:
                    break
                if count >= skip:
                    places.append((shard, start + 12, size))
                start, count = start + 16 + size, count + 1
        if count < skip + take:
            left_out.append(f"{Path(path).name}: damaged, {skip + take - count} records cannot be found")
    return Shards([path for path, _, _ in files], places), left_out
