"""torch.compile captures a detector as one graph, which serves every image size."""

import pytest
import timm
import torch
from commands import dat
from torch import nn

from dat.detection import DETR
from dat.engine.checkpoint import load_checkpoint
from dat.engine.trainer import Trainer

SMALL = {"embed_dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_dim": 16, "num_queries": 5}


def test_one_graph_for_all_sizes():
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model = DETR(backbone, 3, **SMALL).eval()
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


@pytest.mark.parametrize(
    "model", [[], ["model.kind=dino", "model.box_refine=false", "model.two_stage=false"]], ids=["two-stage", "dino"]
)
def test_a_compiled_run_has_the_weights_of_another(model, config_file, tmp_path, monkeypatch):
    """And as many graphs as there are kinds of batches, not as many as there are sizes of images, none of them cut."""
    compiled, sizes = [], set()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    def compile_module(module, **options):
        module._compiled_call_impl = torch.compile(module._call_impl, fullgraph=True, backend=backend, **options)

    def forward(self, model, batch, step, part):
        sizes.add(batch[0].shape)
        return uncounted(self, model, batch, step, part)

    uncounted = Trainer._forward
    monkeypatch.setattr(Trainer, "_forward", forward)
    monkeypatch.setattr(nn.Module, "compile", compile_module)
    torch.compiler.reset()
    # larger, of which no level has the size 1; no dropout
    overrides = ["data.train.sizes=[96,112,128,144,160]", "data.train.max_size=224", "model.drop_rate=0"]
    overrides += ["model.backbone.out_indices=[3]", "model.num_levels=2"]
    overrides += ["data.train.crop=0", "train.epochs=3", "train.eval_epochs=3", *model]
    for run, compile_ in (("eager", "false"), ("compiled", "true")):
        dat("detect", "train", config_file, f"output={tmp_path / run}", f"train.compile={compile_}", *overrides)
    eager, other = (load_checkpoint(tmp_path / run / "last.pth")["state_dict"] for run in ("eager", "compiled"))
    for name, value in eager.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert 1 <= len(compiled) <= 2 < len(sizes)
