"""torch.compile captures a detector as one graph, which serves every image size."""

import pytest
import timm
import torch

from detection import DETR, DeformableDETR

SMALL = {"embed_dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_dim": 16, "num_queries": 5}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DETR, {}), (DeformableDETR, {"box_refine": True, "two_stage": True})],
    ids=["detr", "two-stage"],
)
def test_one_graph_for_all_sizes(kind, options):
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model = kind(backbone, 3, **SMALL, **options).eval()
    torch.compiler.reset()
    # What is captured does not depend on the back end; this one costs no compilation.
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # of which no level has the size 1, that torch.compile always treats apart
        for height, width in ((96, 128), (160, 224)):
            images, mask = torch.randn(2, 3, height, width), torch.zeros(2, height, width, dtype=torch.bool)
            mask[0, 64:] = True
            outputs = compiled(images, mask)
            outputs["pred_boxes"].sum().backward()
            torch.testing.assert_close(outputs["pred_boxes"], model(images, mask)["pred_boxes"])
