"""Implementations that need a GPU, imported from folders with their built modules."""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.ops_peers import Implementation, whole_path
from benchmarks.ops_work import Work, sampling_locations

# Most images that the original op takes at a time; the batch must be a multiple.
STEP = 64


def original(folder: Path) -> Implementation:
    """The extension `MultiScaleDeformableAttention` of fundamentalvision/Deformable-DETR; float32 only."""
    extension = _load(folder, "MultiScaleDeformableAttention")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ctx.save_for_backward(*args[:5])
            ctx.step = args[5]
            return extension.ms_deform_attn_forward(*args)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            by_value, by_locations, by_weights = extension.ms_deform_attn_backward(
                *ctx.saved_tensors, grad.contiguous(), ctx.step
            )
            return by_value, None, None, by_locations, by_weights, None

    def function(work: Work, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out = Function.apply(value, work.sizes, work.starts, locations, weights, min(work.batch, STEP))
        return out.unflatten(-1, value.shape[2:])

    return Implementation("original CUDA op", function, (torch.float32,))


def dcnv4(folder: Path) -> Implementation:
    """`FlashDeformAttnFunction` of the package `DCNv4` (OpenGVLab/DCNv4), whose softmax is in the kernel; float16."""
    apply = _load(folder, "DCNv4.functions.flash_deform_attn_func").FlashDeformAttnFunction.apply

    def function(work: Work, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        points = torch.cat((sampling_locations(work, offsets).flatten(3).half(), logits.flatten(3)), -1)
        out = apply(value, work.sizes, work.starts, points, STEP, offsets.shape[4])
        return out.view(*offsets.shape[:3], value.shape[3])

    return Implementation("DCNv4", function, (torch.float16,))


def load(device: torch.device, folders: dict[str, Path | None]) -> tuple[list[Implementation], list[str]]:
    """Implementations of attention from the folders of "original" and "dcnv4", and why others are missing."""
    found, missing = [], []
    for name, make in (("original", original), ("dcnv4", dcnv4)):
        folder = folders[name]
        if device.type != "cuda":
            missing.append(f"{name}: runs on a GPU only")
        elif folder is None:
            missing.append(f"{name}: no folder given (--{name})")
        else:
            implementation = make(folder)
            found.append(implementation if name == "dcnv4" else whole_path(implementation))
    return found, missing


def _load(folder: Path, module: str) -> Any:
    """Imports a module from a folder. A broken module is an error, not a missing peer."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))
