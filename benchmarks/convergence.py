"""DETR beside Deformable DETR on generated scenes: AP against epochs and seconds.

    python -m benchmarks.convergence [--seeds 0,1,2] [--epochs 6] [--jobs 2] [--variants detr,two_stage]
    python -m benchmarks.convergence --data FOLDER --runs runs/mine --out mine.json --picture mine.png [key.path=value]

Tests at small scale what Zhu et al. (ICLR 2021, arXiv:2010.04159) claim: Deformable DETR reaches DETR's AP in a tenth
of its epochs, and is better on small objects. All variants are configs/detection/scenes.yaml but for what makes them
what they are: same scenes, same backbone, which a short training on digits made, same number of epochs, the rate
falling after four fifths of them; `detr_10x` has ten times as many, of the first seed. Single-scale models work on a
map of stride 16, as those named DC5 in the paper's table 1.

Of three rates each that were tried, for three epochs, the training loss of DETR fell alike with 1e-4 and 2e-4 and less
with 4e-4, that of single-scale Deformable DETR alike with 4e-4 and 8e-4 and less with 2e-4: DETR has 2e-4, all variants
of Deformable DETR 4e-4. The papers' rates, for larger steps, are 1e-4 and 2e-4.

Every run is the command `detection.train`; one that is finished is not run again, one that was interrupted goes on.
Seconds are those of training steps alone: their number times the median time of a step, for which the variants take
turns in one process; on a CPU that is processor time, which other work on the machine hardly changes. FOLDER holds
train.json, val.json and images/.
"""

from collections.abc import Sequence

from benchmarks.detector_runs import Variant, compare, parser

RESNET = {"name": "resnet18", "layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
DC5 = {"output_stride": 16}
LEVEL = {"model.num_levels": 1}
REFINE = {"model.box_refine": True}
# the papers' rates differ by this factor, too
DETR = {"model.kind": "detr", "train.lr": 2e-4}
VARIANTS = {
    "detr": Variant("DETR", RESNET, DC5, DETR),
    "detr_10x": Variant("DETR, ten times the epochs", RESNET, DC5, DETR, times=10, seeds=1),
    "single_scale": Variant("Deformable DETR, single-scale", RESNET, DC5, LEVEL),
    "multi_scale": Variant("Deformable DETR, multi-scale", RESNET),
    "refine": Variant("+ iterative box refinement", RESNET, keys=REFINE),
    "two_stage": Variant("++ two-stage", RESNET, keys={**REFINE, "model.two_stage": True}),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, VARIANTS, "convergence").parse_args(argv)
    reference = "detr_10x" if "detr_10x" in options.variants.split(",") else "detr"
    title = "DETR and Deformable DETR on " + ("generated scenes" if options.data is None else str(options.data))
    compare(VARIANTS, options, reference, title)


if __name__ == "__main__":
    main()
