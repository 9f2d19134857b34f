"""Measures what each ingredient of DINO adds to Deformable DETR: AP against epochs and seconds.

    python -m benchmarks.recipes [--seeds 0,1,2] [--epochs 6] [--jobs 2] [--variants two_stage,dino]
    python -m benchmarks.recipes --data FOLDER --epochs 16 --runs runs/mine [--out FILE.json] [key.path=value]

Every row has the ingredients of the rows above it, the data, the backbone and the epochs of `benchmarks.convergence`,
whose last row is the first one here. Sources: two-stage Deformable DETR (arXiv:2010.04159); DINO's mixed query
selection, look forward twice and contrastive denoising (arXiv:2203.03605); the matchability-aware loss (DEIM,
arXiv:2412.04234); one-to-many training (hybrid matching, arXiv:2207.13080); the average of the weights.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.convergence import REFINE, RESNET
from benchmarks.detector_runs import Variant, compare, on_data, parser

# Ingredients in the order in which they are added: name, label and keys.
INGREDIENTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("two_stage", "Deformable DETR, two-stage", {**REFINE, "model.two_stage": True}),
    ("mixed", "+ mixed query selection", {"model.mixed_selection": True}),
    ("twice", "+ look forward twice", {"model.look_forward_twice": True}),
    ("denoising", "+ contrastive denoising", {"model.denoising": 100}),
    ("matchability", "+ matchability-aware loss", {"train.loss.class_loss": "matchability"}),
    ("one_to_many", "+ one-to-many training", {"model.one_to_many_queries": 150}),
    ("average", "+ average of the weights", {"train.ema_decay": 0.998}),
    # An epoch has twice as many steps, each of half as many images. Cells have no upright side.
    (
        "schedule",
        "+ steps of two images, cosine, flips",
        {
            "train.batch_size": 2,
            "train.lr": 8e-4,
            "train.schedule": "cosine",
            "train.min_lr_scale": 0.01,
            "train.ema_decay": 0.996,
            "data.train.vertical_flip": 0.5,
        },
    ),
)
OF_TWO_STAGE = ("model.box_refine", "model.two_stage", "model.mixed_selection")


def variants() -> dict[str, Variant]:
    """A variant for each ingredient, with those before it, and DINO with the same."""
    found, keys = {}, dict[str, Any]()
    for name, label, added in INGREDIENTS:
        keys = keys | added
        found[name] = Variant(label, RESNET, keys=keys)
    of_dino = {key: value for key, value in keys.items() if key not in OF_TWO_STAGE}
    found["dino"] = Variant("DINO with all of these", RESNET, keys={"model.kind": "dino", **of_dino})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, variants(), "recipes").parse_args(argv)
    compare(variants(), options, "two_stage", on_data("From Deformable DETR to DINO", options))


if __name__ == "__main__":
    main()
