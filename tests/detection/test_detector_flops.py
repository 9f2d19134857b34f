"""fvcore counts detectors, which it traces with torch.jit.trace."""

import pytest
import timm
import torch
from detr_inputs import SMALL
from fvcore.nn import FlopCountAnalysis

from dat.detection import DETR, DINO, DeformableDETR
from dat.ops.flops import fvcore_handles

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DETR, {}), (DeformableDETR, {}), (DeformableDETR, {"box_refine": True, "two_stage": True}), (DINO, {})],
    ids=["detr", "one-stage", "two-stage", "dino"],
)
def test_flops_grow_with_the_image(kind, options):
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model = kind(backbone, 3, **SMALL, **options).eval()
    counts = []
    for side in (128, 256):
        analysis = FlopCountAnalysis(model, torch.randn(1, 3, side, side)).set_op_handle(**fvcore_handles())
        counts.append(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
        assert not [name for name in analysis.unsupported_ops() if name.startswith("dat::")]
    # the maps have four times the cells, the queries stay
    assert 1.5 < counts[1] / counts[0] < 6
