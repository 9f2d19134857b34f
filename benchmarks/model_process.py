"""One backbone in a process of its own, which `benchmarks.models` starts and sends questions to.

"official" needs only torch, and NATTEN if its N blocks use it.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.process import Measured, megabytes, serve
from benchmarks.timing import peak_bytes


class MeasuredBackbone(Measured):
    """A classifier, images and labels.

    Args:
        spec: "implementation" ("ours", "official" or the name of a timm model), "model", "batch", "size" (height,
            width), "device", "threads", "weights" (a file with our model's state and stages) and "neighborhood".
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        model = make_model(spec).to(spec["device"])
        torch.manual_seed(0)
        images = torch.randn(spec["batch"], 3, *spec["size"]).to(spec["device"])
        labels = (torch.arange(spec["batch"]) % 1000).to(spec["device"])
        super().__init__(model, [images], lambda logits: F.cross_entropy(logits, labels), spec["threads"])

    def answers(self) -> dict[str, Callable[..., Any]]:
        return {**super().answers(), "part": self.part, "output": self.output}

    def part(self, name: str, stage: int, index: int) -> float | None:
        """Peak memory of forward and backward of a "block" or its "attention", beyond the input, in megabytes."""
        run = self._part(name, stage, index)
        run()
        return megabytes(peak_bytes(run, self.device))

    def output(self, path: str) -> None:
        """Writes the logits to a file."""
        torch.save(self.forward().cpu(), path)

    def _part(self, part: str, stage: int, index: int) -> Callable[[], None]:
        (images,) = self.inputs
        H, W = (-(-side // (4 * 2**stage)) for side in images.shape[2:])
        if hasattr(self.model, "stages"):
            block = self.model.stages[stage].blocks[index]
            function = block if part == "block" else block.attn
            shape = (len(images), H, W, block.norm1.weight.numel())
        else:
            config, name = self.model.stage_configs[stage], f"stages.{stage}.blocks.{index}"
            function = partial(self.model.block, name, config["blocks"][index], config)
            if part == "attention":
                function = partial(self.model.deformable, f"{name}.attn", config, shift=False)
            shape = (len(images), self.model.get(f"{name}.norm1.weight").numel(), H, W)
        x = torch.randn(shape, device=self.device, requires_grad=True)

        def run() -> None:
            function(x).square().mean().backward()
            # Gradients that stay would be part of the next peak.
            self.model.zero_grad()
            x.grad = None

        return run


def make_model(spec: dict[str, Any]) -> nn.Module:
    """The model; ours and the official one have the same weights."""
    saved = torch.load(spec["weights"], weights_only=True)
    if spec["implementation"] == "official":
        from benchmarks.official_form import OfficialForm

        return OfficialForm(saved["stages"], saved["state"], NEIGHBORHOODS[spec["neighborhood"]])
    import timm

    import dat  # noqa: F401  registers its models

    if spec["implementation"] != "ours":
        options = {"strict_img_size": False} if "swin" in spec["implementation"] else {}
        return timm.create_model(spec["implementation"], drop_path_rate=0.0, **options)
    model = timm.create_model(spec["model"], drop_path_rate=0.0)
    model.load_state_dict(saved["state"])
    return model


def natten(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """NATTEN 0.14.6, on which the official code is built."""
    from benchmarks.natten_peer import attention

    return attention(q, k, v, bias, size=size, kernel_size=(bias.shape[-1] + 1) // 2, scale=scale)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """The faster form in plain PyTorch: dense attention with a mask on small maps, unfolded windows on others."""
    from benchmarks.neighborhood_attn import dense, unfolded

    return (dense if size[0] * size[1] <= 28 * 28 else unfolded)(q, k, v, bias, size, scale)


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """This package's op, so that only the other parts differ."""
    from dat.ops import neighborhood_attn

    return neighborhood_attn(q, k, v, bias, size=size, kernel_size=(bias.shape[-1] + 1) // 2, scale=scale)


NEIGHBORHOODS = {"natten": natten, "plain": plain, "ours": ours}


if __name__ == "__main__":
    serve(MeasuredBackbone(json.loads(Path(sys.argv[1]).read_text())).answers())
