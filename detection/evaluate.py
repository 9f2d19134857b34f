"""Measures the average precision of a detector: python -m detection.evaluate CHECKPOINT [key.path=value ...]

The command `dat detect evaluate` does the same from anywhere.
"""

import argparse

from dat.cli import run_recipe


def main(options: argparse.Namespace) -> None:
    # Imported here, so that --help does not wait for torch.
    from dat.detection import Detector
    from dat.detection.evaluation import format_table

    detector = Detector.from_checkpoint(options.checkpoint, options.overrides, options.device)
    out = options.out or detector.path.parent / "evaluation"
    metrics = detector.evaluate(out=out)
    # Only the first process of torchrun has the metrics.
    if metrics:
        print(f"{format_table(metrics)}\nwritten to {out}")


if __name__ == "__main__":
    run_recipe("detect", "evaluate", main)
