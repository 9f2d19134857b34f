"""The larger and the smaller of two sizes, in graphs that are exported for all sizes too."""

from typing import cast

import torch


def sym_max(length: int, least: int) -> int:
    """max(length, least) that does not decide which of the two it is in a graph that is exported for all sizes."""
    return cast(int, torch.sym_max(length, least)) if torch.compiler.is_exporting() else max(length, least)


def sym_min(length: int, most: int) -> int:
    """min(length, most), as `sym_max`."""
    return cast(int, torch.sym_min(length, most)) if torch.compiler.is_exporting() else min(length, most)
