"""Table of a model's FLOPs by module."""

import inspect
import warnings
from typing import Any

import timm
import torch
from torch import nn

from dat.ops.flops import fvcore_handles
from dat.utils.modules import evaluating


def flops(model: nn.Module | str, size: tuple[int, int] | None = None, max_depth: int = 3) -> str:
    """fvcore's table of parameters and FLOPs by module, for one image; a multiply-add counts as one.

    Args:
        model: a module that takes images [1, C, H, W], or images and a padding mask [1, H, W]; or a name for
            `timm.create_model`.
        size: (H, W) of the image; None: the size that the model was made for, or else 224 x 224.
        max_depth: how deep modules are listed.

    Raises:
        ImportError: fvcore is not installed.
    """
    model = timm.create_model(model) if isinstance(model, str) else model
    with torch.no_grad(), evaluating(model), warnings.catch_warnings():
        # Tracing warns that sizes become constants, which they are here, and torch that it is deprecated.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            from fvcore.nn import FlopCountAnalysis, flop_count_table
        except ImportError as error:
            raise ImportError("counting FLOPs needs fvcore: pip install fvcore", name="fvcore") from error
        analysis = FlopCountAnalysis(model, _inputs(model, size)).set_op_handle(**fvcore_handles())
        # fvcore counts no element-wise ops and would list them; modules left out by pruning are never called.
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return flop_count_table(analysis, max_depth=max_depth)


def _inputs(model: nn.Module, size: tuple[int, int] | None) -> tuple[torch.Tensor, ...]:
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, *default = cfg.get("input_size", (3, 224, 224))
    parameter = next(model.parameters(), torch.empty(0))
    images = parameter.new_zeros(1, getattr(model, "in_chans", channels), *(size or default))
    mask = inspect.signature(model.forward).parameters.get("mask")
    if mask is None or mask.default is not inspect.Parameter.empty:
        return (images,)
    return images, torch.zeros_like(images[:, 0], dtype=torch.bool)
