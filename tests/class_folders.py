"""A data set of tiny images in class folders, and a configuration that trains on it within seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def write_pictures(folder: Path, per_class: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, color in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(color, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_splits(folder: Path) -> Path:
    root = folder / "pictures"
    write_pictures(root / "train", 8, seed=0)
    write_pictures(root / "val", 2, seed=1)
    return root


def make_settings(folder: Path) -> dict:
    """Plain configuration of a run of 3 epochs of 4 steps, with everything random switched on."""
    return {
        "output": str(folder / "run"),
        "model": {"backbone": {"name": "test_convnext", "drop_path_rate": 0.2}},
        "data": {"root": str(folder / "pictures"), "img_size": 32, "crop_pct": 1.0},
        "train": {
            "epochs": 3, "batch_size": 6, "lr": 2e-3, "warmup_epochs": 1, "ema_decay": 0.9,
            "checkpoint_steps": 3, "log_steps": 1, "workers": 0, "device": "cpu", "pictures": 2, "worst": 2,
        },
    }  # fmt: skip
