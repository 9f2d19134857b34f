"""What README and the pages of docs show runs as printed: every block of Python and every command of the package.

Placeholders stand for data that is made here; trainings end after a step or two, which their printed form leaves open.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from coco_scenes import write_scenes
from PIL import Image

import dat  # noqa: F401  registers its models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
# What is added to a printed command, so that it ends soon.
SHORTER = {
    "detection.train": ["train.steps=2", "train.batch_size=1", "train.workers=0", "model.decoder_depth=1"],
    "classification.train": ["train.epochs=1", "train.batch_size=4", "train.workers=0", "data.img_size=32"],
}
# Learning by heart and exports take minutes, and a server does not end: they have tests of their own.
ELSEWHERE = ("--overfit", ".export", ".serve", "model.onnx")


def blocks(language):
    """(page, text) of each block in a language."""
    pages = {page.name: BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    return [(page, text) for page, found in pages.items() for name, text in found if name == language]


def commands():
    """Every different command of the package in the blocks, in the order of the pages."""
    lines = (line.split("  #")[0].strip() for _, text in blocks("bash") for line in text.splitlines())
    commands = dict.fromkeys(line for line in lines if line.startswith("python -m"))
    return [line for line in commands if not any(word in line for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the checkout, with what the placeholders stand for."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_scenes(folder / "scenes", "train", 8)
    write_scenes(folder / "scenes", "val", 2, seed=1)
    for split in ("train", "val"):
        for number in range(8):
            path = folder / "pictures" / split / ("red", "blue")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), ((200, 30 * number, 0), (0, 30 * number, 200))[number % 2]).save(path)
        subprocess.run(["tar", "-cf", f"{split}.tar", split], cwd=folder / "pictures", check=True)
    Image.new("RGB", (400, 300), (90, 120, 60)).save(folder / "photo.jpg")
    for name in ("dat_tiny", "dat_pp_tiny"):
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}_in1k_224.pth")
    return folder


def run(arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("page", sorted({page for page, _ in blocks("python")}))
def test_blocks_of_python_run(page, workplace):
    """One after another: later ones use what earlier ones of a page imported."""
    run(["-c", "\n".join(text for name, text in blocks("python") if name == page)], workplace)


def test_commands_run(workplace):
    """In the order of the pages: later ones use what earlier ones left."""
    found = commands()
    assert len(found) >= 8
    for command in found:
        arguments = shlex.split(command)[1:]
        data = "pictures" if arguments[1].startswith("classification") else "scenes"
        arguments = [a.replace("PATH", data).replace("PICTURES", "scenes/images") for a in arguments]
        run([*arguments, *SHORTER.get(arguments[1], [])], workplace)
    assert "AP" in json.loads((workplace / "runs/mine/evaluation/metrics.json").read_text())
