"""Damages every kind of file that commands take from strangers, and lists what does not end in one clear error.

Configurations, annotations in several formats and the arguments of raw calls of the ops are damaged too.

    python -m tests.fuzz [KIND ...] [--count 500] [--seed 0] [--seconds 60] [--mebibytes 1500] [--out runs/fuzz]

A command may use a damaged file or refuse it in one line that names it. Anything else is listed, and its file kept in
`--out`: another exception, the end of the process, more than so many seconds for one file, or so much more memory.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dat.cli import parse
from dat.engine.command import error_line
from dat.export import runtime
from dat.utils.errors import DataError, UserError
from tests.damage import (
    change_checkpoint,
    change_either,
    change_json,
    change_onnx,
    change_safetensors,
    change_yaml,
    change_zip,
    damage,
    save,
)  # fmt: skip

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name's ending, whole ones, how one is changed within its format, and what uses it."""

    suffix: str
    whole: tuple[bytes, ...]
    use: Callable[[Path], None]
    change: Callable[[bytes, random.Random], bytes] | None = None
    # Errors name the file; those of folders of data and of configurations may name a key or another file.
    named: bool = True

    def case(self, seed: int) -> bytes:
        """A damaged file; the same for the same seed."""
        generator = random.Random(seed)
        data = generator.choice(self.whole)
        if self.change is not None and generator.random() < 0.5:
            return self.change(data, generator)
        return damage(data, generator)


def call(command: str, *arguments: object) -> None:
    """`dat COMMAND ARGUMENTS` in this process."""
    function, options = parse([*command.split(), *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()):
        function(options)


DAT = {
    "name": "dat_nano",
    "stages": [{"blocks": blocks, "embed_dims": 16, "num_heads": 2, "window_size": 4} for blocks in ("LS", "LD")],
}


def make_kinds(folder: Path) -> dict[str, Callable[[], Kind]]:
    """What makes each kind, its whole files and what belongs to them in `folder`."""
    import numpy as np

    import dat.ops  # noqa: F401 (torch.ops.dat)
    from dat import visualize
    from dat.classification.classifier import Classifier
    from dat.classification.config import ClassificationConfig
    from dat.classification.model import build_classifier
    from dat.detection import official
    from dat.detection.checkpoint import load_detector
    from dat.engine.checkpoint import save_checkpoint
    from dat.engine.config import from_dict, to_dict
    from dat.utils.images import FORMATS
    from tests.coco_scenes import write_scenes
    from tests.detection.exporting import write_detector
    from tests.detection.formats import write_all
    from tests.kills import write_data

    picture = folder / "picture.png"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8))
    noise.save(picture)
    out = folder / "out"

    def detectors() -> tuple[Path, ...]:
        models: tuple[dict[str, Any], ...] = ({"box_refine": True, "two_stage": True}, {"kind": "detr"})
        return tuple(write_detector(folder / f"detector_{i}.pth", **model) for i, model in enumerate(models))

    def classifier() -> Path:
        path = folder / "classifier.pth"
        config = from_dict(
            ClassificationConfig, {"model": {"backbone": DAT}, "data": {"root": "nowhere", "img_size": 32}}, "fuzz"
        )
        model = build_classifier(config.model.backbone, 3, weights=False)
        names = ["blue", "green", "red"]
        state = {"kind": "classification", "config": to_dict(config), "class_names": names}
        save_checkpoint(path, {**state, "state_dict": model.state_dict()})
        return path

    def read(*paths: Path) -> tuple[bytes, ...]:
        return tuple(path.read_bytes() for path in paths)

    def detect(path: Path) -> None:
        call("detect predict", path, picture, "--out", out, "--threshold", 0, "--crops", "--trust")

    def label(path: Path) -> None:
        call("classify predict", path, picture, "--out", out, "--crops", "--trust")

    checkpoint = change_either(change_checkpoint, change_zip)

    def detector() -> Kind:
        return Kind(".pth", read(*detectors()), detect, checkpoint)

    def points() -> Kind:
        def use(path: Path) -> None:
            call("detect predict", path, picture, "--out", out, "--threshold", 0.2, "--show-points")

        return Kind(".pth", read(*detectors()), use, change_checkpoint)

    def evaluated_detector() -> Kind:
        scenes = folder / "scenes"
        write_scenes(scenes, "val", 2)
        data = [f"data.root={scenes}", "data.val.annotations=val.json", "data.val.images=images"]
        use = lambda path: call("detect evaluate", path, *data, "--out", out, "--device", "cpu")  # noqa: E731
        return Kind(".pth", read(*detectors()), use, change_checkpoint)

    def exported_detector() -> Kind:
        def use(path: Path) -> None:
            call("detect export", path, "--out", folder / "model.pt2", "--sizes", 64, 96)

        return Kind(".pth", read(*detectors()), use, change_checkpoint)

    def started_detector() -> Kind:
        """As model.checkpoint_path takes it."""
        model = load_detector(detectors()[0], torch.device("cpu")).model
        state = {"model": model.state_dict()}

        def use(path: Path) -> None:
            official.load(model, path)

        return Kind(".pth", (save(state),), use, checkpoint)

    def classifier_kind() -> Kind:
        return Kind(".pth", read(classifier()), label, checkpoint)

    def evaluated_classifier() -> Kind:
        for name in ("blue", "red"):
            (folder / "pictures/val" / name).mkdir(parents=True, exist_ok=True)
            noise.save(folder / "pictures/val" / name / "1.png")

        def use(path: Path) -> None:
            root, size = f"data.root={folder / 'pictures'}", "train.device=cpu"
            call("classify evaluate", path, root, "data.val.path=val", size, "--out", out)

        return Kind(".pth", read(classifier()), use, change_checkpoint)

    def exported_classifier() -> Kind:
        def use(path: Path) -> None:
            call("classify export", path, "--out", folder / "model.pt2", "--sizes", 32, 48)

        return Kind(".pth", read(classifier()), use, change_checkpoint)

    def visualized() -> Kind:
        def use(path: Path) -> None:
            visualize.main([str(path), str(picture), "--out", str(folder / "view.png")])

        return Kind(".pth", read(classifier()), use, checkpoint)

    def weights(suffix: str, change: Callable[..., bytes]) -> Callable[[], Kind]:
        def make() -> Kind:
            import safetensors.torch

            from dat.engine.backbones import load_classifier_weights

            model = Classifier.from_checkpoint(classifier(), device="cpu").model
            state = model.state_dict()
            whole = safetensors.torch.save(state) if suffix == ".safetensors" else save(state)
            return Kind(suffix, (whole,), lambda path: load_classifier_weights(model, path), change)

        return make

    def exported(name: str) -> tuple[bytes, ...]:
        """The file `name`, of a detector or a classifier, which is made once."""
        path = folder / name
        if not path.exists() and path.stem == "detector":
            call("detect export", detectors()[1], "--out", path, "--sizes", 64, 96)
        elif not path.exists():
            call("classify export", classifier(), "--out", path, "--sizes", 32, 48)
        return read(path)

    def onnx_detector() -> Kind:
        return Kind(".onnx", exported("detector.onnx"), detect, change_onnx)

    def onnx_classifier() -> Kind:
        return Kind(".onnx", exported("classifier.onnx"), label, change_onnx)

    def package() -> Kind:
        return Kind(".pt2", exported("detector.pt2"), detect, change_zip)

    def pictures() -> Kind:
        whole = []
        for form in (*FORMATS, "EPS"):
            file = io.BytesIO()
            noise.save(file, form)
            whole.append(file.getvalue())
        for mode in ("P", "LA", "I;16", "1", "CMYK"):
            file = io.BytesIO()
            noise.convert("L" if mode == "I;16" else "RGBA" if mode == "LA" else mode).convert(mode).save(file, "TIFF")
            whole.append(file.getvalue())
        path = detectors()[1]
        return Kind(".jpg", tuple(whole), lambda case: call("detect predict", path, case, "--out", out))

    def uploads() -> Kind:
        from dat.detection import Detector
        from dat.detection.app import find
        from dat.detection.upload import Refused, decode

        detector = Detector.from_checkpoint(detectors()[0], device="cpu")

        def use(path: Path) -> None:
            try:
                find(detector, decode(path.read_bytes(), 10**6), 0.0, True).model_dump_json()
            except Refused as error:
                if not 400 <= error.status < 500 or not str(error):
                    raise

        return Kind(".jpg", pictures().whole, use)

    def videos() -> Kind:
        import av

        whole = []
        for name, codec in (("clip.mp4", "mpeg4"), ("clip.avi", "mpeg4"), ("clip.mkv", "mjpeg"), ("clip.webm", "vp8")):
            with av.open(str(folder / name), "w") as container:
                stream = container.add_stream(codec, rate=5)
                stream.width, stream.height = 96, 80
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for _ in range(6):
                    container.mux(stream.encode(av.VideoFrame.from_image(noise)))
                container.mux(stream.encode())
            whole.append((folder / name).read_bytes())
        path = detectors()[1]
        return Kind(".mp4", tuple(whole), lambda case: call("detect predict", path, case, "--out", out))

    def calls() -> Kind:
        """Arguments of a raw call of an op, as JSON."""
        return Kind(".json", tuple(describe_calls()), call_op, change_json)

    def configuration(task: str) -> Callable[[], Kind]:
        def make() -> Kind:
            def use(path: Path) -> None:
                shutil.rmtree(out, ignore_errors=True)
                call(f"{task} train", path, f"output={out}", length, "train.device=cpu", "train.workers=0")

            # A damaged file may still be sound, and describe a detector of the usual size: an epoch takes minutes.
            data, length = {
                "detect": ("detection", "train.steps=2"),
                "classify": ("classification", "train.epochs=1"),
            }[task]
            shutil.rmtree(folder / "data", ignore_errors=True)
            return Kind(".yaml", read(write_data(data, folder / "data")), use, change_yaml, named=False)

        return make

    def annotations(form: str, name: str, change: Callable[..., bytes] | None = None) -> Callable[[], Kind]:
        """A file of a folder of data in one of the formats."""

        def make() -> Kind:
            shutil.rmtree(folder / "formats", ignore_errors=True)
            root = write_all(folder / "formats")[form]

            def use(path: Path) -> None:
                shutil.copy(path, root / name)
                # An audit that finds what would stop a training prints it and exits with 1.
                with contextlib.suppress(SystemExit):
                    call("detect audit", root, "--out", out, "--samples", 2)

            return Kind(Path(name).suffix, read(root / name), use, change, named=False)

        return make

    return {
        "calls": calls,
        "detection_yaml": configuration("detect"),
        "classification_yaml": configuration("classify"),
        "coco": annotations("coco", "train.json", change_json),
        "yolo": annotations("yolo", "data.yaml", change_yaml),
        "yolo_labels": annotations("yolo", "labels/train/scene_1.txt"),
        "voc": annotations("voc", "Annotations/scene_1.xml"),
        "cvat": annotations("cvat_xml", "annotations.xml"),
        "darknet": annotations("darknet", "train.txt"),
        "labelme": annotations("labelme", "scene_1.json", change_json),
        "huggingface": annotations("huggingface", "train/metadata.jsonl"),
        "detector": detector,
        "points": points,
        "evaluated_detector": evaluated_detector,
        "exported_detector": exported_detector,
        "started_detector": started_detector,
        "classifier": classifier_kind,
        "evaluated_classifier": evaluated_classifier,
        "exported_classifier": exported_classifier,
        "visualized": visualized,
        "weights": weights(".pth", checkpoint),
        "safetensors": weights(".safetensors", change_safetensors),
        "onnx_detector": onnx_detector,
        "onnx_classifier": onnx_classifier,
        "package": package,
        "pictures": pictures,
        "uploads": uploads,
        "videos": videos,
    }


def describe_calls() -> Iterator[bytes]:
    """Sound calls of every op, forward and backward."""
    value, where, weights = (2, 10, 8, 4), (2, 5, 8, 2, 3, 2), (2, 5, 8, 2, 3)
    query, key, window = (2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 42, 8)
    # For each op: the shapes of its tensors, its other arguments, and the arguments that only its backward op takes.
    calls: dict[str, tuple[list[tuple[int, ...]], list[Any], list[Any]]] = {
        "deform_sample": ([value, where, weights], [[2, 3, 4, 1], False], [False]),
        "ms_deform_attn": ([value, (2, 5, 2, 4), where, weights], [[2, 3, 4, 1]], [True, False]),
        "deform_attn": ([query, key, key, (2, 4, 5, 2), (4, 3, 5)], [[2, 3], 0.5, True], []),
        "neighborhood_attn": ([window, window, window, (4, 5, 5)], [7, 6, 3, 2, 0.5], []),
    }

    def describe(op: str, tensors: list[Any], others: list[Any]) -> bytes:
        described = [{"shape": shape, "dtype": "float32", "fill": 0.25} for shape in tensors]
        return json.dumps({"op": op, "arguments": [*described, *others]}).encode()

    for name, (tensors, others, more) in calls.items():
        out = getattr(torch.ops.dat, name)(*map(torch.zeros, tensors), *others)
        kept = [tuple(tensor.shape) for tensor in out] if name == "deform_attn" else []
        grad = kept[0] if kept else tuple(out.shape)
        yield describe(name, tensors, others)
        yield describe(f"{name}_backward", [grad, *tensors, *kept], [*others, *more])


def call_op(path: Path) -> None:
    """Calls an op as a file says. It may refuse the arguments, but not crash."""

    def build(argument: Any) -> Any:
        if not isinstance(argument, dict):
            return argument
        if math.prod(argument["shape"]) > 10**7:
            raise ValueError("too large to try")
        return torch.full(argument["shape"], argument["fill"], dtype=getattr(torch, argument["dtype"]))

    # The file may hold no call at all.
    errors = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    with contextlib.suppress(*errors):
        case = json.loads(path.read_bytes())
        getattr(torch.ops.dat, str(case["op"]))(*map(build, case["arguments"]))


def fails(kind: Kind, path: Path) -> str | None:
    """What is wrong with how a damaged file ends, if anything is."""
    try:
        kind.use(path)
    except (UserError, OSError) as error:
        # A sound checkpoint of other classes: the error names the data that do not fit.
        if kind.named and path.name not in str(error) and not isinstance(error, DataError):
            return f"the error does not name the file: {type(error).__name__}: {str(error)[:300]}"
        if len(error_line(error)) > 2000:
            return f"the error has {len(str(error))} characters: {str(error)[:300]}"
    except BaseException:
        return traceback.format_exc()[-3000:]
    return None


def work(name: str, first: int, options: argparse.Namespace) -> None:
    """Runs the cases of a kind from one on; prints one line of JSON for each that fails."""
    torch.set_num_threads(1)
    # of models that are small
    runtime.MOST_MEMORY = 2**29
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    kind = make_kinds(folder)[name]()
    path = folder / f"case{kind.suffix}"
    for number in range(first, options.count):
        data = kind.case(options.seed * 1_000_000 + number)
        path.write_bytes(data)
        print(json.dumps({"begins": number}), flush=True)
        faulthandler.dump_traceback_later(options.seconds, exit=True, file=sys.__stderr__)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong = fails(kind, path)
        faulthandler.cancel_dump_traceback_later()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if wrong is None and grown > options.mebibytes:
            wrong = f"took {grown:.0f} MiB"
        if wrong is not None:
            (folder / f"{number}{kind.suffix}").write_bytes(data)
            print(json.dumps({"number": number, "wrong": wrong}), flush=True)


def run(name: str, arguments: list[str], options: argparse.Namespace) -> list[tuple[int, str]]:
    """All cases of a kind, in processes that may die; returns what failed."""
    failed: list[tuple[int, str]] = []
    first = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while first < options.count:
        command = [sys.executable, "-m", "tests.fuzz", *arguments, "--work", name, "--first", str(first)]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        failed += [(line["number"], line["wrong"]) for line in lines if "wrong" in line]
        last = max((line["begins"] for line in lines if "begins" in line), default=None)
        if process.returncode == 0:
            break
        if last is None:
            raise SystemExit(f"{name}: cannot begin: {process.stderr[-3000:]}")
        failed.append((last, f"the process ended with {process.returncode}: {process.stderr[-3000:]}"))
        first = last + 1
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--count", type=int, default=500, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="most for a file")
    parser.add_argument("--mebibytes", type=float, default=1500, help="most that a file may add to the peak of memory")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        faulthandler.enable(sys.__stderr__)
        work(options.work, options.first, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = make_kinds(options.out)
    if unknown := [name for name in options.kinds if name not in kinds]:
        parser.error(f"KIND must be of {', '.join(kinds)}, got {', '.join(unknown)}")
    passed = [argument for argument in sys.argv[1:] if argument not in options.kinds]
    total = 0
    for name in options.kinds or kinds:
        failed = run(name, passed, options)
        total += len(failed)
        print(f"{name}: {len(failed)} of {options.count} files do not end well", flush=True)
        for number, wrong in failed:
            print(f"  {number}: {wrong.strip()}", flush=True)
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
