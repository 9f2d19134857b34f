"""DAT, DAT++, Swin and ResNet of equal FLOPs as the backbone of one detector: AP against epochs and seconds.

    python -m benchmarks.backbones [--seeds 0,1,2] [--epochs 6] [--jobs 2] [--variants dat_pp,swin]

The detector is the two-stage Deformable DETR of configs/detection/scenes.yaml, with the same recipe for all backbones.
Only batch norm is frozen. Each backbone is trained to classify digits first, for the same number of epochs. DAT++ is
`dat_pp_nano`; Swin is the one of `benchmarks.accuracy`; DAT is `dat_nano` with wider MLPs, and ResNet is a ResNet-18
with fewer channels, so that all four have the same FLOPs within 1 % at the size of the scenes. Runs and seconds are as
in `benchmarks.convergence`. Swin takes only square images, which matters with `--data`.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy import MODELS
from benchmarks.detector_runs import Sizes, Variant, compare, parser

TWO_STAGE = {"model.box_refine": True, "model.two_stage": True, "model.freeze": []}
# Side of a scene after resizing, in pixels.
SIDE = 96


def variant(
    label: str, features: dict[str, Any] | None = None, classifier: dict[str, Any] | None = None, **backbone: Any
) -> Variant:
    return Variant(label, {**backbone, "drop_path_rate": 0.0}, features or {}, TWO_STAGE, classifier or {})


SWIN = {**MODELS["swin of dat_pp_nano"], "img_size": Sizes.shown}
VARIANTS = {
    "dat_pp": variant("DAT++ (dat_pp_nano)", **MODELS["dat_pp_nano"]),
    "dat": variant("DAT (dat_nano, wider MLPs)", name="dat_nano", mlp_ratio=5.75),
    # At the others' 1e-3 it learns nothing: its loss stays at log 10.
    "swin": variant("Swin", {"img_size": SIDE}, {"train.lr": 3e-4}, **SWIN),
    "resnet": variant("ResNet", name="resnet18", channels=[28, 56, 112, 224]),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, VARIANTS, "backbones").parse_args(argv)
    compare(VARIANTS, options, None, "Backbones of equal FLOPs in two-stage Deformable DETR")


if __name__ == "__main__":
    main()
