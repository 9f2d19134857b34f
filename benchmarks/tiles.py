"""Tiles on an image of 6,000 x 9,000 pixels: AP, memory and time beside those of its parts alone.

    make demo
    python -m benchmarks.tiles [--checkpoint runs/demo/best.pth] [--tiles 600] [--tile-overlap 0.5]

The image is pasted together from validation images of the checkpoint's data, resized to 600 pixels, in 15 rows of 10.
`dat detect predict` searches it in tiles, and the 150 images one by one: their AP should be equal up to 0.02. Both use
--nms 0.5, because tiles merge detections that overlap as much. Memory is the largest resident set of a command, which
also reads and draws the images. Writes to runs/tiles.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dat.detection import Detector
from dat.detection.data import Annotations, ImageRecord, read_dataset
from dat.detection.draw import open_record
from dat.detection.evaluation import average_precision

COLUMNS, ROWS, SIDE = 10, 15, 600


def make_images(annotations: Annotations, folder: Path) -> tuple[Annotations, Annotations]:
    """Writes the parts and the large image; returns their annotations."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    large = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE))
    parts = []
    for number in range(COLUMNS * ROWS):
        record = annotations.records[number % len(annotations.records)]
        part = open_record(record).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        path = folder / "parts" / f"{number:03d}.png"
        part.save(path)
        large.paste(part, (number % COLUMNS * SIDE, number // COLUMNS * SIDE))
        x, y = SIDE / record.width, SIDE / record.height
        boxes = record.boxes * np.array([x, y, x, y], np.float32)
        parts.append(
            ImageRecord(number + 1, path, SIDE, SIDE, boxes, record.labels, record.crowd, record.areas * (x * y))
        )
    path = folder / "large.jpg"
    large.save(path, quality=95)
    corners = [np.array([n % COLUMNS, n // COLUMNS] * 2, np.float32) * SIDE for n in range(len(parts))]
    boxes = np.concatenate([part.boxes + corner for part, corner in zip(parts, corners, strict=True)])
    labels, crowd, areas = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "crowd", "areas")
    )
    whole = ImageRecord(1, path, *large.size, boxes, labels, crowd, areas)
    return (
        Annotations(folder / "parts", annotations.categories, tuple(parts)),
        Annotations(path, annotations.categories, (whole,)),
    )


def predict(checkpoint: Path, source: Path, out: Path, options: Sequence[Any]) -> dict[str, Any]:
    """Runs the command; returns its largest resident set in MiB, and its seconds."""
    command = ["-m", "dat.cli", "detect", "predict", checkpoint, source, "--out", out, "--device", "cpu", "--nms", 0.5]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, [*command, *options])])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{source}: predict ended with status {status}")
    return {"MiB": usage.ru_maxrss // 2**10, "seconds": round(time.perf_counter() - start, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo/best.pth"))
    parser.add_argument("--tiles", type=int, default=600)
    parser.add_argument("--tile-overlap", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("runs/tiles"))
    options = parser.parse_args(argv)
    config = Detector.from_checkpoint(options.checkpoint, device="cpu").config
    assert config is not None
    parts, large = make_images(read_dataset(config.data, "val"), options.out)
    tiles = ["--tiles", options.tiles, "--tile-overlap", options.tile_overlap]
    for truth, extra in ((parts, []), (large, tiles)):
        out = options.out / f"{truth.path.stem}_found"
        row = predict(options.checkpoint, truth.path, out, extra)
        metrics = average_precision(truth, json.loads((out / "detections.json").read_text()), every=True)
        print(truth.path, row | {name: metrics[name] for name in ("AP", "AP50", "AP75", "APm", "APl")}, flush=True)
    one = parts.records[0].path
    print(one, predict(options.checkpoint, one, options.out / "one_found", []))


if __name__ == "__main__":
    main()
