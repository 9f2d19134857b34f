"""Measures detectors of configs/detection beside transformers' DETR and Deformable DETR.

    python -m benchmarks.detection [--configs detr_r50,deformable_detr_r50] [--sizes 480x640,800x1333] [--train] \
        [--memory] [--out benchmarks/results/detection_cpu.json]

Weights are random, and images have no padding; training steps have 10 objects in each image and end with AdamW. Each
detector runs in a process of its own, and they take turns. Parameters are counted for COCO's 91 class ids; FLOPs are
fvcore's, which counts a multiply-add as one.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import show, sizes
from benchmarks.process import Process, peaks, take_turns
from benchmarks.timing import device, names_of, write_json

FOLDER = Path("configs/detection")
REFINED = {"with_box_refine": True}
# transformers' model of the same architecture, and its options.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr_r50": ("DetrForObjectDetection", {}),
    "detr_r50_dc5": ("DetrForObjectDetection", {"dilation": True}),
    "deformable_detr_r50": ("DeformableDetrForObjectDetection", {}),
    "deformable_detr_r50_refine": ("DeformableDetrForObjectDetection", REFINED),
    "deformable_detr_r50_two_stage": ("DeformableDetrForObjectDetection", {**REFINED, "two_stage": True}),
}
DEFAULT = ("detr_r50", "detr_r50_dc5", "deformable_detr_r50_single_scale", "deformable_detr_r50_single_scale_dc5",
           "deformable_detr_r50", "deformable_detr_r50_refine", "deformable_detr_r50_two_stage")  # fmt: skip


def starter(config: str, size: tuple[int, int], options: argparse.Namespace) -> Any:
    """A function that starts the process of "ours" or "transformers" for a configuration."""

    def start(name: str) -> Process:
        peer, peer_options = PEERS.get(config, ("", {}))
        spec = {
            "implementation": str(FOLDER / f"{config}.yaml") if name == "ours" else peer,
            "options": peer_options,
            "batch": options.batch,
            "size": size,
            "device": str(options.device),
            "threads": torch.get_num_threads(),
        }
        return Process("benchmarks.detector_process", [json.dumps(spec)])

    return start


def measure(config: str, size: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one configuration at one size: complexity, then times and memory of each pass."""
    start = starter(config, size, options)
    names = ("ours", "transformers") if config in PEERS else ("ours",)
    head = {"model": config, "size": list(size), "batch": options.batch, "device": str(options.device)}
    rows = []
    with start("ours") as process:
        rows.append({**head, "what": "complexity", **process.ask("complexity")})
    for what in ("forward", "step") if options.train else ("forward",):
        with ExitStack() as stack:
            processes = {name: stack.enter_context(start(name)) for name in names}
            rows.append({**head, "what": what, **take_turns(processes, what, options.batch, options.repeats)})
        if options.memory:
            rows.append({**head, "what": f"peak of {what}", **peaks(start, names, "peak", what)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = names_of(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    parser.add_argument("--configs", type=known, default=",".join(DEFAULT), help=f"of {FOLDER}, with commas between")
    parser.add_argument("--sizes", type=sizes, default="480x640,800x1333", help="sides or HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="training steps too")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    options = parser.parse_args(argv)
    rows = []
    for config in options.configs:
        for size in options.sizes:
            for row in measure(config, size, options):
                show(row)
                rows.append(row)
            if options.out:
                write_json(options.out, rows)


if __name__ == "__main__":
    main()
