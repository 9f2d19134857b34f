"""Sizes in graphs that are exported for all of them."""

from typing import cast

import torch


def is_exporting() -> bool:
    """Whether torch.export traces; torch.compiler.is_exporting is also true in torch 2.11's torch.compile."""
    return torch.compiler._is_exporting_flag


def sym_max(length: int, least: int) -> int:
    """max(length, least) that does not decide which of the two it is in a graph that is exported for all sizes."""
    return cast(int, torch.sym_max(length, least)) if is_exporting() else max(length, least)


def sym_min(length: int, most: int) -> int:
    """min(length, most), as `sym_max`."""
    return cast(int, torch.sym_min(length, most)) if is_exporting() else min(length, most)
