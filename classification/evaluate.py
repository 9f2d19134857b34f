"""Measures the accuracy of a classifier: python -m classification.evaluate CHECKPOINT [key.path=value ...]

The command `dat classify evaluate` does the same from anywhere.
"""

import argparse

from dat.cli import run_recipe


def main(options: argparse.Namespace) -> None:
    # Imported here, so that --help does not wait for torch.
    from dat.classification import Classifier
    from dat.classification.results import format_table

    classifier = Classifier.from_checkpoint(options.checkpoint, options.overrides, options.device)
    out = options.out or classifier.path.parent / "evaluation"
    metrics = classifier.evaluate(out=out, real=options.real, v2=options.v2)
    # Only the first process of torchrun has the metrics.
    if metrics:
        print(f"{format_table(metrics)}\nwritten to {out}")


if __name__ == "__main__":
    run_recipe("classify", "evaluate", main)
