"""Samples in shards on this machine, read in any order: tars of WebDataset, records of TensorFlow Datasets.

timm's readers of both only stream: their evaluation drops and repeats samples when there are several processes, what
they cannot read has no name, and no place of an epoch can be gone back to. An index of where samples begin, made when a
split is opened, has a place for each; nothing but the sample itself is read again.
"""

import json
import os
import struct
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers.targets import get_field
from timm.utils import natural_key

from dat.utils.errors import DataError

# key of a sample, and (first byte, size) of its files by extension
Members = tuple[str, dict[str, tuple[int, int]]]


class Shards:
    """Where samples lie: item i is the bytes of sample i. Raises OSError where they are not there any more.

    Args:
        paths: of the shards.
        places: (shard, first byte, size) of each sample.
    """

    def __init__(self, paths: Sequence[str], places: Sequence[tuple[int, int, int]]) -> None:
        self.paths, self.places = list(paths), np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> bytes:
        shard, start, size = self.places[index].tolist()
        # opened each time, as pictures in folders are: workers and threads share nothing
        with open(self.paths[shard], "rb") as file:
            file.seek(start)
            return file.read(size)

    def shard(self, index: int) -> str:
        """File name of the shard of a sample."""
        return os.path.basename(self.paths[self.places[index, 0]])


class WebReader:
    """Samples of WebDataset shards, as timm's map-style readers give them: item i is (open file, class index)."""

    def __init__(self, shards: Shards, labels: np.ndarray, keys: np.ndarray) -> None:
        self.shards, self.labels, self.keys = shards, labels, keys

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        return BytesIO(self.shards[index]), int(self.labels[index])

    def filename(self, index: int) -> str:
        return f"{self.shards.shard(index)}/{os.fsdecode(self.keys[index])}"


def open_web(
    paths: Sequence[str], lengths: Sequence[int], extensions: Sequence[str], label_key: str, names: Sequence[str] | None
) -> tuple[WebReader, list[str], list[str]]:
    """Indexes WebDataset shards.

    A class is the number in the file KEY.cls, or the number or text in the field `label_key` of KEY.json. Samples of
    negative numbers are left out, as by timm.

    Args:
        paths: of the shards, uncompressed tars.
        lengths: samples that each should hold; empty: not known.
        extensions: of pictures, the first that a sample has counts.
        label_key: "a/b" is field b of field a.
        names: of the classes, which the numbers count; None: those that are there, numbers under their own names.

    Returns:
        the samples, the names of the classes that they have, or of all up to the largest number where `names` is None,
        and what was left out: damaged shards, samples without picture or class.
    Raises:
        DataError: no samples, or a class that is not among `names`.
    """
    places: list[tuple[int, int, int]] = []
    labels: list[int | str] = []
    keys: list[bytes] = []
    left_out: list[str] = []
    for shard, path in enumerate(paths):
        name, found = os.path.basename(path), 0
        with open(path, "rb") as file:
            for key, members in _samples(path, left_out):
                found += 1
                picture = next((members[extension] for extension in extensions if extension in members), None)
                label = _label(file, members, label_key)
                if picture is None or label is None:
                    left_out.append(f"{name}/{key}")
                elif isinstance(label, str) or label >= 0:
                    places.append((shard, *picture))
                    labels.append(label)
                    keys.append(os.fsencode(key))
        if len(lengths) == len(paths) and found < lengths[shard]:
            left_out.append(f"{name}: {found} of the {lengths[shard]} samples that it should hold")
    if not places:
        wanted = f"a picture ({', '.join(extensions)}) and a class ({f'{label_key} of json' if label_key else 'cls'})"
        raise DataError(f"no sample with {wanted}" + (f"; left out: {left_out[0]}" if left_out else ""))
    numbers, present = _number(labels, names)
    return WebReader(Shards(paths, places), numbers, np.array(keys)), present, left_out


def _samples(path: str, left_out: list[str]) -> Iterator[Members]:
    """The samples of a shard: consecutive files of one name before its first dot. Damages are told to `left_out`."""
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(path, "r:") as tar:
            files = ((*base_plus_ext(member.name), member) for member in tar if member.isreg())
            for key, members in groupby(files, key=lambda file: file[0]):
                if key is not None:
                    yield key, {ext.lower(): (member.offset_data, member.size) for _, ext, member in members}
            # tarfile takes what is no header for the end
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"no tar from byte {tar.offset} on")
    except (tarfile.TarError, OSError) as error:
        left_out.append(f"{os.path.basename(path)}: {error}")


def _label(file: Any, members: dict[str, tuple[int, int]], label_key: str) -> int | str | None:
    """The class of a sample, None where it has none that can be read."""
    place = members.get("json" if label_key else "cls")
    if place is None:
        return None
    file.seek(place[0])
    content = file.read(place[1])
    try:
        if not label_key:
            return int(content)
        value = get_field(json.loads(content), label_key)
        return value if isinstance(value, str) else int(value)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None


def _number(labels: list[int | str], names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Class indices [n] and the names of the classes, see open_web."""
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise DataError("some classes are numbers and some are texts, should be one or the other")
    found = sorted(set(labels), key=lambda label: natural_key(str(label)))
    if kinds == {str}:
        all_names = list(found) if names is None else list(names)
        index = {name: k for k, name in enumerate(all_names)}
        unknown = [label for label in found if label not in index]
    else:
        if names is None and max(found) >= len(labels):
            raise DataError(f"class {max(found)} of {len(labels)} samples; data.class_names should name a file")
        all_names = [str(k) for k in range(max(found) + 1)] if names is None else list(names)
        index = {k: k for k in found}
        unknown = [label for label in found if label >= len(all_names)]
    if unknown:
        raise DataError(f"class {unknown[0]!r} is not among the {len(all_names)} of the training data")
    present = all_names if names is None else [all_names[index[label]] for label in found]
    return np.array([index[label] for label in labels]), present


class RecordReader:
    """Samples of a split of TensorFlow Datasets, as timm's map-style readers give them; TensorFlow is not needed.

    Args:
        shards: of the split's records, or the data source that the package has where its files are no TFRecords.
        features: of the data set.
        image_key, label_key: a picture and a class among them.
        classes: number of each of the data set's classes.
    """

    def __init__(self, shards: Any, features: Any, image_key: str, label_key: str, classes: Sequence[int]) -> None:
        self.shards, self.features, self.classes = shards, features, list(classes)
        self.image_key, self.label_key = image_key, label_key

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        sample = self.shards[index]
        if isinstance(sample, bytes):
            sample = self.features.deserialize_example_np(sample, decoders=encoded(self.image_key))
        return BytesIO(bytes(sample[self.image_key])), self.classes[int(sample[self.label_key])]

    def filename(self, index: int) -> str:
        place = f" of the split, in {self.shards.shard(index)}" if isinstance(self.shards, Shards) else " of the split"
        return f"record {index}{place}"


def encoded(image_key: str) -> dict[str, Any]:
    """Decoders of TensorFlow Datasets that leave a picture as the bytes of its file."""
    import tensorflow_datasets as tfds

    return {image_key: tfds.decode.SkipDecoding()}


def index_records(files: Sequence[tuple[str, int, int]]) -> tuple[Shards, list[str]]:
    """Finds the records of TFRecord files: little-endian size, four bytes, content, four bytes.

    Args:
        files: (path, records to pass over, records to take).

    Returns:
        the records, and a text for each file that ends before its time.
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
