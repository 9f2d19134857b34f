"""DETR beside Deformable DETR on generated scenes: AP against epochs and seconds.

    python -m benchmarks.convergence [--seeds 0,1,2] [--epochs 6] [--jobs 2] [--variants detr,two_stage]
    python -m benchmarks.convergence --data FOLDER --runs runs/mine [--out FILE.json] [--plot FILE.png] [key.path=value]

Tests the claims of Zhu et al. (ICLR 2021, arXiv:2010.04159) at small scale: Deformable DETR reaches DETR's AP in a
tenth of the epochs, and is better on small objects. All variants use configs/detection/scenes.yaml: the same scenes,
the same backbone, trained briefly on digits, and the same number of epochs, with the rate falling after four fifths of
them. `detr_10x` has ten times as many epochs, with the first seed only. Single-scale models work on a map of stride 16,
as those named DC5 in the paper's table 1.

Three learning rates were tried for three epochs each. The training loss of DETR fell equally with 1e-4 and 2e-4, and
less with 4e-4; that of single-scale Deformable DETR equally with 4e-4 and 8e-4, and less with 2e-4. DETR therefore has
2e-4, and all variants of Deformable DETR 4e-4. The papers' rates, for larger steps, are 1e-4 and 2e-4.

Every run is the command `detection.train`. Finished runs are not repeated, interrupted ones continue. Seconds count
training steps only: their number times the median time of a step, measured with the variants in turns in one process.
On a CPU this is processor time, which other work on the machine hardly changes. FOLDER is data as `dat detect train`
takes them.
"""

from collections.abc import Sequence

from benchmarks.detector_runs import Variant, compare, on_data, parser

RESNET = {"name": "resnet18", "layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
DC5 = {"output_stride": 16}
LEVEL = {"model.num_levels": 1}
REFINE = {"model.box_refine": True}
# The papers' rates differ by this factor too.
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
    reference = "detr_10x" if "detr_10x" in options.variants else "detr"
    compare(VARIANTS, options, reference, on_data("DETR and Deformable DETR", options))


if __name__ == "__main__":
    main()
