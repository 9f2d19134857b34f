"""Decoded images in memory."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from dat.detection.data.records import ImageRecord, load_image


class ImageCache:
    """Images as load_image gives them, by path; filled before loaders start, whose forked workers use the same memory.

    Args:
        gib: most memory to use, in GiB.
    """

    def __init__(self, gib: float):
        self.free = gib * 2**30
        self._images: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

    def fill(self, records: Iterable[ImageRecord]) -> None:
        """Reads images, in order, while there is room for them. Raises DataError for one that cannot be read."""
        chosen = []
        for record in {record.path: record.file for record in records}.values():
            size = 3 * record.width * record.height
            if size > self.free:
                break
            self.free -= size
            chosen.append(record)
        with ThreadPoolExecutor() as pool:
            images = pool.map(lambda record: load_image(record.path, (record.width, record.height)), chosen)
            self._images.update(zip((record.path for record in chosen), images, strict=True))

    def get(self, path: Path) -> Tensor | None:
        """The image, not to be changed in place; None where it is not in memory."""
        return self._images.get(path)
