"""Small data sets in COCO's format, made on the spot, and the configuration of a micro detector on them."""

import json
import random
from pathlib import Path

import yaml
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


def write_config(folder: Path, scenes: Path) -> Path:
    """config.yaml in `folder`, whose runs go to `folder`/run."""
    config = {
        "output": str(folder / "run"),
        "model": {
            # strides 4, 8 and 16: the images are tiny
            "backbone": {"name": "test_resnet", "out_indices": [1, 2, 3]},
            "num_queries": 10,
            "embed_dim": 16,
            "num_heads": 2,
            "encoder_depth": 1,
            "decoder_depth": 2,
            "mlp_dim": 32,
            "box_refine": True,
            "two_stage": True,
            "freeze_batch_norm": False,
        },
        "data": {
            "root": str(scenes),
            "train": {
                "annotations": "train.json",
                "images": "images",
                "sizes": [48, 64],
                "max_size": 96,
                "crop_resize": [60],
                "crop_min": 30,
                "crop_max": 60,
                "photometric": 0.5,
            },
            "val": {"annotations": "val.json", "images": "images", "size": 48, "max_size": 96},
        },
        "train": {
            "epochs": 2,
            "batch_size": 2,
            "lr": 1e-3,
            "workers": 0,
            "ema_decay": 0.9,
            "log_steps": 1,
            "pictures": 2,
            "worst": 2,
            "device": "cpu",
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def scenes_in(folder: Path) -> Path:
    """A folder with train.json, val.json and images/, four images each."""
    root = folder / "scenes"
    write_scenes(root, "train", 4)
    write_scenes(root, "val", 4, seed=1)
    return root
