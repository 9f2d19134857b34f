"""Implementations of the ops' workloads: this package's and its peers.

All functions take (work, *tensors) and return the output; see `benchmarks.ops_work.Work`.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops_work import Work, attention_weights, sampling_locations
from dat.layers.deform_conv import deform_conv2d
from dat.ops import deform_sample, ms_deform_attn, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a kind of workload.

    Attributes:
        name: in the table.
        function: (work, *tensors) to the output.
        dtypes: model dtypes to measure.
        ours: whether it is this package's op, which peers are compared with.
        prepare: converts the tensors of a workload to the implementation's own layout; not timed.
        restore: converts its output to this package's layout.
    """

    name: str
    function: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    ours: bool = False
    prepare: Callable[..., tuple[Tensor, ...]] = lambda work, *tensors: tensors
    restore: Callable[[Work, Tensor], Tensor] = lambda work, out: out

    def only(self, dtype: torch.dtype) -> "Implementation":
        """The same implementation, measured in one dtype."""
        return replace(self, dtypes=(dtype,))


def grid_sample_form(work: Work, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale sampling as one grid_sample for each level, every sample in memory before the weighted sum."""
    B, _, H, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    # grid_sample takes one dtype: in half precision the locations are rounded too.
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).to(value.dtype)
    samples = []
    for level, (h, w) in enumerate(work.shapes):
        start = sum(a * b for a, b in work.shapes[:level])
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * H, D, h, w)
        grid = grids[:, :, level].reshape(B * H, Q, P, 2)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    attention = weights.permute(0, 2, 1, 3, 4).reshape(B * H, 1, Q, -1)
    out = (torch.stack(samples, -2).flatten(-2) * attention).sum(-1)
    return out.view(B, H, D, Q).permute(0, 3, 1, 2)


def whole_path(implementation: Implementation) -> Implementation:
    """Attention by an implementation of the sampling, with softmax and location arithmetic in torch."""

    def function(work: Work, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return implementation.function(work, value, sampling_locations(work, offsets), attention_weights(logits))

    return replace(implementation, function=function, ours=False)


def transformers_layer() -> Implementation:
    """transformers' kernel layer without a kernel from the hub."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    layer = MultiScaleDeformableAttention()

    def function(work: Work, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out = layer(value, work.sizes, list(work.shapes), work.starts, locations, weights, 64)
        return out.unflatten(-1, value.shape[2:])

    return Implementation("transformers", function, (torch.float32,))


def peer(op: str, device: torch.device) -> Implementation:
    """The peer that everybody can run for workload `op` on `device`."""
    return EXACT[op] if device.type == "cuda" else EXACT[op].only(torch.float32)


def sampling_peers(device: torch.device) -> tuple[list[Implementation], list[str]]:
    """Peers that sample on `device`, and reasons why other known ones do not."""
    found, missing = [peer("sampling", device)], []
    if device.type == "cpu":
        # It counts pixels in 16 bits there, and reads wrong addresses beyond 32767.
        missing += ["grid_sample in half precision: torch's CPU kernel reads outside of such maps"]
        missing += ["torchvision in half precision: no bfloat16 on a CPU, and float16 slower than float32"]
    try:
        found.append(transformers_layer())
    except ImportError as error:
        missing.append(f"transformers: {error}")
    return found, missing


def compiled_peers(device: torch.device) -> tuple[list[Implementation], list[str]]:
    """torch.compile of whole paths, compiled again for each workload because it compiles for one size."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return [], ["torch.compile: no C++ compiler"]
    torch.compiler.reset()
    grid = whole_path(Implementation("compiled grid_sample", grid_sample_form, (torch.float32,)))

    def gather(work: Work, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return reference.ms_deform_attn(value, work.shapes, work.reference, offsets, logits)

    forms = (grid, Implementation("compiled gather", gather, (torch.float32,)))
    return [replace(f, function=torch.compile(f.function, fullgraph=True, dynamic=False)) for f in forms], []


def _ours_fused(work: Work, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return ms_deform_attn(value, work.shapes, work.reference, offsets, logits)


def _ours_sampling(work: Work, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return deform_sample(value, work.shapes, locations, weights)


def _ours_dat(work: Work, value: Tensor, locations: Tensor) -> Tensor:
    return deform_sample(value, work.shapes, locations, align_corners=True)


def _ours_dcn(work: Work, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(input, offset, weight, padding=1, mask=mask)


def _torchvision_dcn(work: Work, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return torchvision.ops.deform_conv2d(input, offset, weight, padding=1, mask=mask)


def _prepare_dat(work: Work, value: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B * g, D, H, W] and grids [B * g, Hk, Wk, 2] of -1 to 1, as in DAT's official code."""
    image = value.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, work.shapes[0])
    grid = (2 * locations[:, :, :, 0, 0] - 1).transpose(1, 2).flatten(0, 1).unflatten(1, work.keys)
    return image, grid


def _grid_sample_dat(work: Work, image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid.to(image.dtype), mode="bilinear", padding_mode="zeros", align_corners=True)


def _restore_dat(work: Work, out: Tensor) -> Tensor:
    return out.flatten(2).unflatten(0, (work.batch, -1)).permute(0, 3, 1, 2)[:, :, :, None, None]


# Sources of exact results in float64; none of them is this package's.
EXACT = {
    "sampling": Implementation("grid_sample", grid_sample_form),
    "attention": whole_path(Implementation("grid_sample", grid_sample_form)),
    "dat": Implementation("grid_sample", _grid_sample_dat, prepare=_prepare_dat, restore=_restore_dat),
    "dcn": Implementation("torchvision", _torchvision_dcn),
}
OURS = {
    "sampling": Implementation("deform_sample", _ours_sampling, ours=True),
    "attention": Implementation("ms_deform_attn", _ours_fused, ours=True),
    "dat": Implementation("deform_sample", _ours_dat, ours=True),
    "dcn": Implementation("DeformConv2d", _ours_dcn, ours=True),
}
