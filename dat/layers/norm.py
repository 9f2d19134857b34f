"""Layer norms of maps, by our kernels where they take them."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from dat.layers.autocast import calls_forward_only, is_ours
from dat.ops import layer_norm as fused
from dat.ops._common import PLAIN, autocast_dtype


def layer_norm(norm: nn.Module, x: Tensor, before: nn.Module | None = None) -> Tensor:
    """norm(x) of [..., C]; in autocast's dtype if our kernels take it and `before`, the next layer, would cast it."""
    if not is_fused(norm, x):
        return norm(x)
    half = before is not None and is_ours(before) and x.dtype == torch.float32
    dtype = _linear_dtype(x) if half else torch.float32
    return fused.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)


def add_layer_norm(
    norm: nn.Module, x: Tensor, branch: Tensor, before: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """x + branch and its `layer_norm`."""
    if is_fused(norm, x) and x.dtype == torch.float32 and _is_branch(branch, x):
        dtype = branch.dtype if before is not None and is_ours(before) else torch.float32
        return fused.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    x = x + branch
    return x, layer_norm(norm, x, before)


def is_fused(norm: nn.Module, x: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether our kernels may stand in for a call of `norm`: it runs its class's `forward` alone, and they take `x`."""
    return type(norm) is nn.LayerNorm and fused.has_layer_norm(x, norm.weight, norm.bias) and calls_forward_only(norm)


def _is_branch(branch: Tensor, x: Tensor) -> bool:
    """Whether our kernels add `branch` to `x`: a plain tensor of its shape, in the dtype that linear layers return."""
    return type(branch) in PLAIN and branch.shape == x.shape and branch.dtype == _linear_dtype(x)


def _linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers return: autocast's, float32 without it."""
    return autocast_dtype(x) or torch.float32
