"""`make demo`: fine-tunes a DAT-backed Deformable DETR on scenes of handwritten digits, about ten minutes on two cores.

    python -m examples.demo

Makes its data, trains dat_nano to classify digits, fine-tunes the detector from that backbone, and writes predictions,
metrics and the training curve to runs/demo. After an interruption the same command continues.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import timm
import torch

import dat  # noqa: F401  registers its models with timm
from examples.digits import make_crops, make_scenes, make_whole

OUTPUT = Path("runs/demo")


def run(module: str, config: str) -> None:
    """Runs one of the project's commands, which prints its own errors."""
    command = [sys.executable, "-m", module, config, "train.resume=true"]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def estimate_minutes() -> float:
    """Minutes that the demo takes here, from the speed of its backbone in training, measured for two seconds.

    Where it trains on 28 images of 224 x 224 pixels a second, the demo takes ten minutes (two cores of an AMD EPYC).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, images = timm.create_model("dat_nano", num_classes=10).to(device), torch.rand(8, 3, 224, 224, device=device)

    def step() -> None:
        model(images).logsumexp(1).mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < 2:
        step()
        steps += 1
    return 10 * 28 * (time.perf_counter() - start) / (steps * len(images))


def main() -> None:
    start = time.perf_counter()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"This takes about {max(1, round(estimate_minutes()))} minutes on {where}", flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    make_whole(OUTPUT / "digits", partial(make_crops, train=6400, val=397, size=64))
    make_whole(OUTPUT / "scenes", partial(make_scenes, train=800, val=100, size=176))
    run("classification.train", "configs/classification/demo.yaml")
    run("detection.train", "configs/detection/demo.yaml")
    metrics = json.loads((OUTPUT / "metrics.json").read_text())
    print(
        f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes: "
        f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} on held-out scenes.\n"
        f"  report    {OUTPUT / 'report.html'}\n"
        f"  metrics   {OUTPUT / 'metrics.json'}\n"
        f"  curve     {OUTPUT / 'curve.png'}\n"
        f"  images    {OUTPUT / 'predictions'}\n"
        f"Draw your own: {sys.executable} -m detection.predict {OUTPUT / 'best.pth'} IMAGE --out runs/predictions"
    )


if __name__ == "__main__":
    main()
