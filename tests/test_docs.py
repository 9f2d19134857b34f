"""What README and the pages of docs show runs as printed: every block of Python and every command of the package.

Placeholders stand for data that is made here; trainings end after a step or two, which their printed form leaves open.
"""

import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
from coco_scenes import write_scenes
from PIL import Image
from processes import run_processes

import dat  # noqa: F401  registers its models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
# What is added to a printed command, so that it ends soon: small models of the same kind, few steps.
SHORTER = {
    "detection.train": [
        "train.steps=2", "train.batch_size=1", "train.workers=0", "model.backbone.name=test_resnet",
        "model.embed_dim=16", "model.num_heads=2", "model.mlp_dim=16", "model.encoder_depth=0", "model.decoder_depth=1",
        "model.num_levels=2", "model.backbone.out_indices=[3]", "model.two_stage=false", "model.box_refine=false",
    ],
    "detection.export": ["--sizes", "64", "96"],
    "classification.train": [
        "train.epochs=1", "train.batch_size=4", "train.workers=0", "data.img_size=32",
        "model.backbone.stages=[{blocks: ND, embed_dims: 16, num_heads: 2, kernel_size: 3, release: '2023'}]",
    ],
    "classification.export": ["--sizes", "32", "48"],
}  # fmt: skip


def blocks(language):
    """(page, text) of each block in a language."""
    pages = {page.name: BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    return [(page, text) for page, found in pages.items() for name, text in found if name == language]


def commands():
    """Every different command of the package in the blocks, in the order of the pages."""
    lines = (line.split("  #")[0].strip() for _, text in blocks("bash") for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line.startswith("python -m")))


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


def execute(folder, module, arguments):
    """python -m MODULE ARGUMENTS in a folder, in this process."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    if "--overfit" in arguments:
        # what it takes to learn by heart is tested elsewhere
        from dat.detection import overfit

        overfit.STEPS, overfit.ENOUGH, overfit.TARGET = 2, 0.0, 0.0
    if module == "detection.serve":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        sys.argv += ["--port", str(port)]
        threading.Thread(target=ask, args=(f"http://127.0.0.1:{port}/detect", folder), daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def ask(address, folder):
    """Asks a server once, and interrupts it."""
    request = urllib.request.Request(address, (folder / "photo.jpg").read_bytes(), {"Content-Type": "image/jpeg"})
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                (folder / "answer.json").write_bytes(answer.read())
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("page", sorted({page for page, _ in blocks("python")}))
def test_blocks_of_python_run(page, workplace):
    """One after another: later ones use what earlier ones of a page imported."""
    text = "\n".join(text for name, text in blocks("python") if name == page)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", text], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_commands_run(workplace):
    """In the order of the pages: later ones use what earlier ones left."""
    found = commands()
    assert len(found) >= 16
    for command in found:
        module, *arguments = shlex.split(command)[2:]
        data = "pictures" if module.startswith("classification") else "scenes"
        arguments = [a.replace("PATH", data).replace("PICTURES", "scenes/images") for a in arguments]
        arguments += SHORTER.get(module, [])
        start = time.time()
        codes, errors, _ = run_processes(1, execute, workplace, workplace, module, arguments, timeout=600)
        print(f"{time.time() - start:.1f} s {command}", file=sys.stderr)
        assert codes == [0], f"{command}\n{errors[0][-2000:]}"
    assert "AP" in json.loads((workplace / "runs/mine/evaluation/metrics.json").read_text())
    assert json.loads((workplace / "answer.json").read_text())["width"] == 400
    assert (workplace / "model.onnx").stat().st_size > 10_000
