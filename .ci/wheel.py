"""Builds the wheel from the tracked files into dist/ and checks it: `make wheel`, or `.ci/wheel.py [PYTHON:TORCH ...]`.

It is checked beside the torch that built it, then in a fresh environment for each PYTHON:TORCH, such as
python3.10:torch~=2.11.0: a Python on the PATH or of pyenv, and a requirement of torch for pip. A torch from elsewhere
needs pip told where from, such as PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for torch==2.13.0+cpu.
DAT_BUILD_CUDA=0 builds and checks a wheel without the CUDA library.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import toolkits  # noqa: E402

MODULE = [sys.executable, "-m"]
WITH_CUDA = torch.version.cuda is not None and os.environ.get("DAT_BUILD_CUDA") != "0"
# An environment with CUDA takes 5 GB: not in a /tmp that may be memory.
SCRATCH = ROOT / "build"


def call(*command: str | Path, **options) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def provide_toolkit() -> None:
    """Install PyPI's nvcc of torch's CUDA version where no toolkit of its major version is found."""
    wanted = str(torch.version.cuda)
    if not any(str(major) == wanted.split(".")[0] for _, (major, _) in toolkits()):
        call(*MODULE, "pip", "install", f"cuda-toolkit[nvcc,cudart,cccl]=={wanted}.*")


def build(scratch: Path) -> Path:
    """The wheel, built from a source distribution of the tracked files, so that both hold what they need."""
    copy = scratch / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    call(*MODULE, "build", "--no-isolation", "--outdir", scratch / "dist", copy)
    (wheel,) = (scratch / "dist").glob("*.whl")
    return wheel


def check_contents(wheel: Path, scratch: Path) -> None:
    """The wheel suits every Python from 3.10, holds all that the commands need, and no run path of this machine."""
    if not wheel.name.split("-", 2)[2].startswith("cp310-abi3-"):
        sys.exit(f"the wheel must be cp310-abi3, got {wheel.name}")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {"dat/_C_cpu.abi3.so", "dat/_C_cuda.abi3.so"} if WITH_CUDA else {"dat/_C_cpu.abi3.so"}
    libraries = {name for name in names if name.endswith(".so")}
    if libraries != expected:
        sys.exit(f"{wheel.name} must contain {sorted(expected)}, contains {sorted(libraries)}")
    if not any(name.endswith("/LICENSE") for name in names):
        sys.exit(f"{wheel.name} has no LICENSE")
    check_files(wheel.name, set(names))
    entry_points = next(name for name in names if name.endswith("/entry_points.txt"))
    if "dat = dat.cli:main" not in zipfile.ZipFile(wheel).read(entry_points).decode():
        sys.exit(f"{wheel.name} has no command dat")
    for name in libraries:
        library = zipfile.ZipFile(wheel).extract(name, scratch)
        dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
        if "PATH" in dynamic:
            sys.exit(f"{name} must not have a run path:\n{dynamic}")


def check_files(wheel: str, names: set[str]) -> None:
    """Every module, configuration and page of the checkout is in the wheel, and nothing else."""
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dat").rglob("*") if path.suffix in (".py", ".html")}
    expected |= {"dat/py.typed"} | {f"dat/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    found = {name for name in names if not re.match(r"dat/_C_\w+\.abi3\.so$|dat_vision-[^/]*\.dist-info/", name)}
    if found != expected:
        sys.exit(f"{wheel} lacks {sorted(expected - found)} and should not contain {sorted(found - expected)}")


def check_report(python: Path, folder: Path, scratch: Path, **environment: str) -> None:
    """Run `python -m dat.ops` from an empty folder; the package must be the one in `folder`, its libraries in use."""
    empty = scratch / "empty"
    empty.mkdir(exist_ok=True)
    clean = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    call(python, "-m", "dat.cli", "detect", "train", "--help", cwd=empty, env=clean | environment)
    call(python, "-m", "dat.ops", "--json", scratch / "report.json", cwd=empty, env=clean | environment)
    report = json.loads((scratch / "report.json").read_text())
    libraries = report["libraries"]
    has_cuda = WITH_CUDA and report["versions"]["CUDA of torch"] != "none"
    for name in ("_C_cpu", "_C_cuda") if has_cuda else ("_C_cpu",):
        if not libraries[name].startswith(str(folder)):
            sys.exit(f"{name} must be loaded from {folder}, got: {libraries[name]}")
    # On GPUs Triton runs the attentions.
    on_gpu = ("deform_sample", "ms_deform_attn") if has_cuda else ()
    served = [row for row in report["self-test"] if row["device"] == "cpu" or row["op"] in on_gpu]
    unused = [row for row in served if row["kernel"] != "library"]
    if unused:
        sys.exit(f"the libraries must run every op, PyTorch runs {unused}")


def check_beside_builder(wheel: Path, scratch: Path) -> None:
    target = scratch / "target"
    call(*MODULE, "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    check_report(Path(sys.executable), target, scratch, PYTHONPATH=str(target))


def find_python(name: str) -> Path | None:
    """A Python by name, such as python3.10, on the PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for path in (shutil.which(name), *sorted(pyenv.glob(f"*/bin/{name}"))):
        # pyenv puts names on the PATH that do not run.
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return Path(path)
    return None


def check_fresh(wheel: Path, python: Path, requirement: str, scratch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        call(python, "-m", "venv", folder)
        inside = Path(folder, "bin", "python")
        call(inside, "-m", "pip", "install", "--quiet", requirement, wheel)
        check_report(inside, Path(folder), scratch)


def main(checks: list[str]) -> None:
    if WITH_CUDA:
        provide_toolkit()
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        scratch = Path(folder)
        wheel = build(scratch)
        check_contents(wheel, scratch)
        check_beside_builder(wheel, scratch)
        done, others = [], 0
        for check in checks:
            name, _, requirement = check.partition(":")
            python = find_python(name)
            if python is None:
                print(f"{check}: not checked, no {name} on this machine")
                continue
            check_fresh(wheel, python, requirement, scratch)
            done.append(check)
            others += name != f"python{sys.version_info.major}.{sys.version_info.minor}"
        if checks and not others:
            sys.exit(f"none of {checks} is another Python that this machine has: the wheel is not checked")
        (ROOT / "dist").mkdir(exist_ok=True)
        shutil.copy2(wheel, ROOT / "dist")
    print(f"dist/{wheel.name}: works beside torch {torch.__version__}", *done, sep=", ")


if __name__ == "__main__":
    main(sys.argv[1:])
