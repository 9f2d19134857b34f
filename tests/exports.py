"""Exports classifiers and detectors of full size, and compares the files with torch. From the root of a checkout:

    python -m tests.exports [NAME ...] [--formats onnx pt2 compiled] [--checkpoints FILE ...]

NAME: a timm model, or a file of configs/detection without its ending. Their weights are drawn, so that every query has
boxes and scores of its own; `--checkpoints` takes trained ones instead. A case is the export command, which compares
file and torch at two sizes, alone and in pairs, and then a batch of three at a size that the command has not seen.

Prints the command's line and one of its own per case: the largest differences of the other size, and seconds and
peak memory of the case's process. Exits with 1 if a case fails. Minutes for each detector: too long for the test suite.
"""

import argparse
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import timm
import torch
from torch import nn

from dat.classification import export as classification_export
from dat.classification.classifier import Classifier
from dat.classification.config import ClassificationConfig
from dat.classification.model import build_classifier
from dat.cli import parse
from dat.detection import export as detection_export
from dat.detection.checkpoint import detector_state, load_detector
from dat.detection.config import DetectionConfig
from dat.detection.data import Category
from dat.detection.graph import pad_images
from dat.detection.models import build_model
from dat.engine.checkpoint import load_checkpoint, save_checkpoint
from dat.engine.config import from_dict, load_config, to_dict
from dat.export.export import Samples
from dat.export.runtime import load_exported
from dat.utils.errors import UserError

FORMATS = ("onnx", "pt2", "compiled")
CLASSIFIERS = ("dat_nano", "dat_plus_nano", "dat_pp_nano")
DETECTORS = ("deformable_detr_dat_nano", "deformable_detr_r50", "detr_r50")
# shortest edge, in pixels, of the batch that the commands do not see
UNSEEN = {"classification": 250, "detection": 333}


def draw_weights(model: nn.Module) -> None:
    """Draws all weights but those of a detector's backbone, so that none is zero and queries differ.

    Activations shrink: where they keep their size, boxes in float32 are 1e-3 pixels from those in float64.
    """
    for name, parameter in model.named_parameters():
        if "backbone" not in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7 / math.sqrt(parameter[0].numel()))


def write_checkpoint(name: str, path: Path) -> None:
    """A checkpoint of a classifier or detector that was not trained."""
    torch.manual_seed(0)
    if timm.is_model(name):
        backbone = {"name": name, "drop_path_rate": 0.0}
        config = from_dict(ClassificationConfig, {"model": {"backbone": backbone}, "data": {"root": "nowhere"}}, name)
        model, names = build_classifier(backbone, 1000), [f"class {k}" for k in range(1000)]
        draw_weights(model)
        state = {"kind": "classification", "config": to_dict(config), "class_names": names}
    else:
        config = load_config(DetectionConfig, f"configs/detection/{name}.yaml", ["data.root=nowhere"])
        categories = tuple(Category(k, f"class {k}") for k in range(1, 81))
        model = build_model(config.model, len(categories), weights=False)
        draw_weights(model)
        state = detector_state(config, categories)
    save_checkpoint(path, {**state, "state_dict": model.state_dict()})


def compare(checkpoint: Path, out: Path, form: str) -> str:
    """The largest differences of a batch of three at another size; raises AssertionError where they are too large."""
    kind = load_checkpoint(checkpoint)["kind"]
    exported = load_exported(out, kind, trust=True)
    pair, _ = Samples.read(None, Path("nowhere")).batches([UNSEEN[kind]])
    images = torch.cat([pair, pair.flip(-1)])[:3]
    if kind == "classification":
        classifier = Classifier.from_checkpoint(checkpoint, device="cpu")
        model, data = classifier.trained_model(), classifier.config.data
        graph = classification_export.classifier_graph(model, data, classifier.class_names, True)
        side = exported.metadata["img_size"]
        inputs = (images[..., :side, :side] if form == "compiled" else images,)
    else:
        detector = load_detector(checkpoint, torch.device("cpu"))
        top_k = detector.config.data.val.top_k
        data = detector.config.data
        graph = detection_export.detector_graph(detector.model, data, detector.categories, top_k)
        inputs = (images, torch.tensor([[0, 0], [480, 640], [300, 500]]))
        if form == "compiled":
            multiple = exported.metadata["padded_to"]
            graph = detection_export.padded_graph(graph, detector.model, data, top_k, multiple)
            inputs = pad_images(*inputs, multiple)
    with torch.no_grad():
        wanted = graph.module(*inputs)
    found = graph.difference(wanted, exported.run(*inputs))
    figures = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    if not all(value <= graph.tolerances[name] for name, value in found.items()):
        raise AssertionError(figures)
    scores = wanted[1] if kind == "classification" else wanted[0]
    return f"{figures} at {list(inputs[0].shape)}, scores {scores.min():.2g} to {scores.max():.2g}"


def check(name: str, form: str, checkpoint: Path) -> None:
    """One case, in a process of its own; prints its lines and exits with 1 if it fails."""
    start = time.perf_counter()
    task = "detect" if load_checkpoint(checkpoint)["kind"] == "detection" else "classify"
    with tempfile.TemporaryDirectory() as folder:
        ending, flags = ("pt2", ["--compile"]) if form == "compiled" else (form, [])
        out = Path(folder) / f"{checkpoint.parent.name}.{ending}"
        try:
            function, options = parse([task, "export", str(checkpoint), "--out", str(out), *flags])
            function(options)
            verdict, figures = "ok", compare(checkpoint, out, form)
        except (UserError, AssertionError) as error:
            verdict, figures = "FAILED", str(error)
    seconds = f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of CPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{verdict} {name} {form}: {figures}; {seconds}, {peak:.1f} GiB", flush=True)
    sys.exit(verdict != "ok")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all of CLASSIFIERS and DETECTORS by default")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], metavar="FILE", help="trained models")
    args = parser.parse_args()
    names = args.names or ([] if args.checkpoints else [*CLASSIFIERS, *DETECTORS])
    context = multiprocessing.get_context("spawn")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = [(str(path), path) for path in args.checkpoints]
        for name in names:
            cases.append((name, Path(folder) / name / "best.pth"))
            cases[-1][1].parent.mkdir()
            write_checkpoint(*cases[-1])
        # a process that ends gives all its memory back
        for (name, checkpoint), form in product(cases, args.formats):
            process = context.Process(target=check, args=(name, form, checkpoint))
            process.start()
            process.join()
            failed += process.exitcode != 0
            if process.exitcode not in (0, 1):
                print(f"FAILED {name} {form}: exit code {process.exitcode}", flush=True)
    total = len(cases) * len(args.formats)
    print(f"{total - failed} of {total} cases ok")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
