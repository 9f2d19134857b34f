"""Sample inputs for correctness, gradients, opcheck and compile of `deform_sample`, and what tests of ops share."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPES = ((5, 7), (3, 1), (1, 1))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal float32 numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty_like(tensor: Tensor) -> Tensor:
    """NaN, which shows what a kernel did not write."""
    return torch.full_like(tensor, float("nan"))


def close(ours: Tensor, exact: Tensor, tolerance: float, least: float = 1e-6) -> None:
    """Assert that no element is off by more than `tolerance` times the largest of `exact`, or times `least`."""
    assert ours.shape == exact.shape
    scale = max(exact.abs().max().item(), least) if exact.numel() else least
    torch.testing.assert_close(ours.double().cpu(), exact.double().cpu(), rtol=0, atol=tolerance * scale)


def close_where_finite(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Assert that rows are not finite only where those of `exact` are not, and that the others are close."""
    finite = exact.isfinite().all(-1, keepdim=True)
    assert ours.isfinite().all(-1, keepdim=True)[finite].all()
    ours, exact = (torch.where(finite, rows.double().cpu(), 0.0) for rows in (ours, exact))
    scale = max(exact.abs().max().item(), 1.0) if exact.numel() else 1.0
    torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance * scale)


def opcheck(op: Any, args: tuple, dispatch: bool, atol: float) -> None:
    """torch.library.opcheck; `dispatch`: with the check of what the compiler makes of the op."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if dispatch else []
    torch.library.opcheck(op, args, test_utils=checks, atol=atol, rtol=0)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call; locations reach outside the maps on every side."""

    B: int = 2
    H: int = 3
    D: int = 8
    Q: int = 5
    P: int = 2
    shapes: tuple[tuple[int, int], ...] = SHAPES
    dtype: torch.dtype = torch.float32
    weighted: bool = True
    align_corners: bool = False
    contiguous: bool = True
    device: str = "cpu"
    name: str = field(default="", compare=False)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value, locations and weights (None where the sample is unweighted)."""
        generator = torch.Generator().manual_seed(0)
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        cells = sum(h * w for h, w in self.shapes)
        layout = (self.B, self.Q, self.H, len(self.shapes), self.P)
        value = torch.randn(self.B, cells, self.H, self.D, generator=generator, dtype=torch.float64).to(self.dtype)
        locations = (torch.rand(*layout, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3).to(real)
        weights = torch.randn(layout, generator=generator, dtype=torch.float64).to(real) if self.weighted else None
        tensors = [value, locations, weights]
        if not self.contiguous:
            tensors = [t if t is None else t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
        value, locations, weights = (t if t is None else t.to(self.device) for t in tensors)
        return value, locations, weights

    def flat_shapes(self) -> list[int]:
        return [size for shape in self.shapes for size in shape]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHANNELS = (1, 8, 24, 32, 33, 64, 96)

SAMPLES = [
    *(Sample(dtype=dtype, name=f"{dtype}") for dtype in DTYPES),
    *(Sample(dtype=dtype, weighted=False, name=f"unweighted-{dtype}") for dtype in DTYPES),
    *(Sample(D=D, dtype=dtype, name=f"D{D}-{dtype}") for D in CHANNELS for dtype in (torch.float32, torch.bfloat16)),
    Sample(D=200, H=1, name="wide"),
    Sample(align_corners=True, name="align_corners"),
    Sample(align_corners=True, weighted=False, P=1, shapes=((9, 4),), D=64, name="dat"),
    Sample(contiguous=False, name="strided"),
    Sample(contiguous=False, weighted=False, dtype=torch.bfloat16, name="strided-unweighted"),
    Sample(B=0, name="batch-0"),
    Sample(B=33, Q=3, D=24, name="batch-33"),
    Sample(Q=0, name="no-queries"),
    Sample(P=0, name="no-points"),
    Sample(D=0, name="no-channels"),
    Sample(shapes=((0, 3), (2, 2)), name="empty-level"),
    Sample(P=9, shapes=((6, 5),), name="kernel-3x3"),
    Sample(P=7, shapes=((2, 9), (4, 4), (3, 3), (1, 8), (5, 1)), name="five-levels"),
]
