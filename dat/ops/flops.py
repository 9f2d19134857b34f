"""FLOP formulas of the ops for fvcore's counter; torch's own, FlopCounterMode, supports the ops already.

fvcore.nn.FlopCountAnalysis(model, inputs).set_op_handle(**dat.ops.flops.fvcore_handles())
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Handle = Callable[[Sequence[Any], Sequence[Any]], int]


def fvcore_handles() -> dict[str, Handle]:
    """Handles by operator name, as FlopCountAnalysis.set_op_handle takes them.

    Besides this package's ops they count scaled_dot_product_attention, which models use and fvcore lacks.
    fvcore counts a multiply-add as one operation and torch as two: a handle gives half of torch's formula.
    """
    names = "deform_sample", "ms_deform_attn", "deform_attn", "neighborhood_attn"
    ops = [getattr(torch.ops.dat, name) for name in names]
    handles = {op._qualified_op_name: _half(flop_registry[op]) for op in ops}
    return {**handles, "aten::scaled_dot_product_attention": _half(_attention_flops)}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _half(formula: Callable[..., int]) -> Handle:
    """A handle, which sees values of a traced graph, of a formula in the shapes of tensors and in numbers."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        args = [value.type().sizes() if value.isCompleteTensor() else value.toIValue() for value in inputs]
        return formula(*args) // 2

    return handle
