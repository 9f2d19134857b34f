"""Small data sets in COCO's format, made on the spot."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

CATEGORIES = [{"id": 11, "name": "red"}, {"id": 3, "name": "blue"}]
COLORS = {11: (220, 30, 30), 3: (30, 60, 220)}


def write_scenes(root: Path, split: str, count: int, seed: int = 0) -> dict:
    """Squares of two colours on grey, wide and upright in turn; returns what it wrote to `split`.json."""
    rng = random.Random(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        width, height = ((80, 60), (56, 72))[number % 2]
        picture = Image.new("RGB", (width, height), (60, 60, 60))
        for _ in range(2):
            category, side = rng.choice([11, 3]), rng.randrange(14, 28)
            x, y = rng.randrange(width - side), rng.randrange(height - side)
            ImageDraw.Draw(picture).rectangle((x, y, x + side - 1, y + side - 1), fill=COLORS[category])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "category_id": category,
                    "bbox": [x, y, side, side],
                }
            )
        name = f"{split}_{number}.jpg"
        picture.save(root / "images" / name)
        images.append({"id": 100 + number, "file_name": name, "width": width, "height": height})
    data = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_json(root / f"{split}.json", data)
    return data


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
