"""README and the pages of docs run as printed: every command of the package and every block of Python.

Placeholders stand for data that is made here. Trainings get a small model and few steps, which their printed form
leaves open, and draw only where a page reads what they draw. Commands that would do again what another has done, or
write a file that no page reads, are only parsed.
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
from dat.cli import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
# Arguments added to a printed command, so that it ends soon: small models of the same kind, few steps.
SMALL_DETECTOR = [
    "model.embed_dim=16", "model.num_heads=2", "model.mlp_dim=16", "model.encoder_depth=0", "model.decoder_depth=1",
    "model.num_levels=1", "model.backbone.out_indices=[3]", "model.num_queries=5", "train.ema_decay=0",
    "data.train.sizes=[64]", "data.train.max_size=96", "data.val.size=64", "data.val.max_size=96",
]  # fmt: skip
ADDED = {
    "detect train": ["train.steps=2", "train.batch_size=1", "train.workers=0", *SMALL_DETECTOR],
    "detect export": ["--sizes", "64", "96"],
    "classify train": ["train.epochs=1", "train.batch_size=4", "train.workers=0", "data.img_size=32"],
    "classify export": ["--sizes", "32", "48"],
}


def blocks(language):
    """(page, text) of each block in a language."""
    pages = {page.name: BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    return [(page, text) for page, found in pages.items() for name, text in found if name == language]


def commands():
    """Every different command of the package in the blocks, in the order of the pages; README's first."""
    texts = (re.sub(r"\s*\\\n\s*", " ", text) for _, text in blocks("bash"))
    lines = (re.split(r"\s+#", line)[0].strip() for text in texts for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line.startswith(("dat ", "python -m"))))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the data that the placeholders stand for."""
    folder = tmp_path_factory.mktemp("docs")
    write_scenes(folder / "scenes", "train", 8)
    write_scenes(folder / "scenes", "val", 2, seed=1)
    for split in ("train", "val"):
        for number in range(8):
            path = folder / "classes" / split / ("red", "blue")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), ((200, 30 * number, 0), (0, 30 * number, 200))[number % 2]).save(path)
    Image.new("RGB", (400, 300), (90, 120, 60)).save(folder / "photo.jpg")
    for name in ("dat_tiny", "dat_pp_tiny"):
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}_in1k_224.pth")
    return folder


def execute(folder, arguments):
    """`dat ARGUMENTS` or `python -m MODULE ARGUMENTS` in a folder, in this process."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    if "--overfit" in arguments:
        # Learning by heart is tested elsewhere.
        from dat.detection import overfit

        overfit.STEPS, overfit.ENOUGH, overfit.TARGET = 2, 0.0, 0.0
    if arguments[1:3] == ["detect", "serve"]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments += ["--port", str(port)]
        threading.Thread(target=ask, args=(f"http://127.0.0.1:{port}/detect", folder), daemon=True).start()
    if arguments[0] == "dat":
        from dat.cli import main

        main(arguments[1:])
    else:
        sys.argv = arguments[2:]
        runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)


def ask(address, folder):
    """Sends an image to a server, and interrupts the server after its answer."""
    request = urllib.request.Request(address, (folder / "photo.jpg").read_bytes(), {"Content-Type": "image/jpeg"})
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                (folder / "answer.json").write_bytes(answer.read())
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


# Runs every page in a process of its own, which has imported timm, as `dat` does, but nothing of `dat`.
RUN_PAGES = """
import os, sys, timm
for page, text in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:
        exec(compile(text, page, "exec"), {"__name__": "__main__"})
        break
    if os.wait()[1]:
        sys.exit(1)
"""


def run_python(workplace):
    """The blocks of each page one after another: later ones use names of earlier ones."""
    texts = {}
    for page, text in blocks("python"):
        texts[page] = f"{texts.get(page, '')}\n{text}"
    arguments = [argument for item in texts.items() for argument in item]
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RUN_PAGES, *arguments], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.long
def test_commands_run_and_then_python_that_reads_their_files(workplace):
    found = commands()
    assert len(found) >= 20
    served = False
    for command in found:
        arguments = shlex.split(command)
        data = "classes" if "classify" in arguments[:2] else "scenes"
        added = ADDED.get(" ".join(arguments[1:3]), [])
        if "from_classifier" in command:
            # The printed backbone stays, whose maps have other sizes than those of the small one.
            added = [text for text in added if "out_indices" not in text]
        elif "detect train" in command:
            added = [*added, "model.backbone.name=test_resnet"]
        if "hf-hub:" in command:
            added = [*added, "model.checkpoint_path=null", "model.backbone.pretrained=false"]
        replaced = {"PATH": data, "data.root=PATH": f"data.root={data}", "IMAGES": "scenes/images"}
        # Tests have no network, and train a few steps.
        left_out = ("train.epochs=", "model.backbone.pretrained=")
        arguments = [replaced.get(text, text) for text in arguments if not text.startswith(left_out)] + added
        if only_parsed(arguments, served):
            parse(arguments[1:])
            continue
        served |= arguments[1:3] == ["detect", "serve"]
        if " ".join(arguments[1:3]) in ("detect train", "classify train") and "output=runs/mine" not in arguments:
            arguments += ["train.pictures=0", "train.worst=0"]
        start = time.time()
        codes, errors, _ = run_processes(1, execute, workplace, workplace, arguments, timeout=600)
        print(f"{time.time() - start:.1f} s {command}", file=sys.stderr)
        assert codes == [0], f"{command}\n{errors[0][-2000:]}"
    assert "AP" in json.loads((workplace / "runs/mine/evaluation/metrics.json").read_text())
    assert json.loads((workplace / "answer.json").read_text())["width"] == 400
    assert (workplace / "model.onnx").stat().st_size > 10_000
    run_python(workplace)


def only_parsed(arguments, served):
    """Whether a command need not run: a server after the first, and an export of a classifier that no page reads."""
    if arguments[1:3] == ["classify", "export"]:
        out = arguments[arguments.index("--out") + 1]
        return not any(out in text for _, text in blocks("python"))
    return arguments[1:3] == ["detect", "serve"] and served


def anchors(page):
    """Headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_files_that_contributing_names_are_there():
    names = re.findall(r"`((?:dat|tests|docs|configs|benchmarks|examples|detection|classification)/[\w./]*)`",
                       (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))  # fmt: skip
    assert len(names) > 15
    missing = [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing
