"""The CUDA kernels' own source on the host: `tests/cuda_host` stands in for CUDA and checks every access to memory."""

import ctypes
import fcntl
import math
import mmap
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ops import samples
from torch import Tensor

from dat.ops import reference

CXX = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

SOURCES = Path(__file__).parent.parent / "cuda_host"
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
close = partial(samples.close, least=1.0)
SHAPES = ((5, 7), (3, 1), (1, 1))
# Some ops have kernels of their own for these; other rows are walked in slices, a pack of channels or one at a time.
SPECIAL_CHANNELS = (32, 64, 96, 128)
OTHER_CHANNELS = (1, 3, 8, 24, 33, 36, 144, 256)
BUFFERS = (
    *("value", "locations", "weights", "reference", "offsets", "logits", "grad", "out"),
    *("grad_value", "grad_locations", "grad_weights", "grad_reference", "grad_offsets", "grad_logits"),
)
FLAGS = ("align_corners", "narrow", "boxes", "deterministic", "last_lane_first", "max_batch", "max_grid")


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


class Arguments(ctypes.Structure):
    """The same fields as in driver.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "BSHDQLP"),
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in FLAGS),
        *((name, Buffer) for name in BUFFERS),
    ]


def build(output: Path, source: str, defines: tuple[str, ...] = (), function: str = "run") -> ctypes.CDLL:
    """A library of the emulator and `source`, built unless it is there; its `function` returns what went wrong."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    # A fortified longjmp takes the change to another fibre's stack for an error.
    flags = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", f"-I{SOURCES}"]
    command = [CXX, *flags, *defines, str(SOURCES / "emulator.cpp"), str(SOURCES / source), "-o", str(output)]
    if not output.exists():
        subprocess.run(command, check=True)
    library = ctypes.CDLL(str(output))
    getattr(library, function).restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[torch.dtype, ctypes.CDLL]:
    """Built once for all processes of pytest-xdist, while which the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_host"
    folder.mkdir(exist_ok=True)

    def library(dtype: torch.dtype) -> ctypes.CDLL:
        defines = [f"-DDAT_VALUE_TYPE={TYPES[dtype]}"]
        # Vector atomics of sm_90 here, those of older devices there.
        if dtype in (torch.float32, torch.bfloat16):
            defines.append("-D__CUDA_ARCH__=900")
        return build(folder / f"{TYPES[dtype]}.so", "driver.cpp", tuple(defines))

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return dict(zip(TYPES, pool.map(library, TYPES), strict=True))


@dataclass(frozen=True)
class Case:
    """One call; samples reach outside the maps on every side."""

    B: int = 2
    H: int = 3
    D: int = 32
    Q: int = 5
    P: int = 2
    shapes: tuple[tuple[int, int], ...] = SHAPES
    dtype: torch.dtype = torch.float32
    align_corners: bool = False
    # Of ms_deform_attn: offsets and logits in the dtype of the values, and boxes for reference points.
    narrow: bool = False
    boxes: bool = False
    # Storage that does not start at a whole vector.
    unaligned: bool = False
    last_lane_first: bool = False
    # Samples sorted at a time, and heads or images that a grid has room for.
    max_batch: int = 1 << 23
    max_grid: int = 65535

    @property
    def real(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def cells(self) -> int:
        return sum(h * w for h, w in self.shapes)

    def numbers(self, seed: int, *size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1

    def value(self) -> Tensor:
        return self.numbers(0, self.B, self.cells, self.H, self.D).to(self.dtype)

    def layout(self) -> tuple[int, ...]:
        return self.B, self.Q, self.H, len(self.shapes), self.P

    def points(self) -> tuple[Tensor, Tensor]:
        return (self.numbers(1, *self.layout(), 2) * 0.8 + 0.5).to(self.real), self.numbers(2, *self.layout()).to(
            self.real
        )

    def attention(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.dtype if self.narrow else self.real
        points = (self.numbers(3, self.B, self.Q, len(self.shapes), 4 if self.boxes else 2) * 0.4 + 0.5).to(self.real)
        return (
            points,
            (self.numbers(4, *self.layout(), 2) * 3).to(dtype),
            (self.numbers(5, *self.layout()) * 4).to(dtype),
        )

    def grad(self, *size: int) -> Tensor:
        return self.numbers(6, *size).to(self.dtype)


def run_on_host(library: ctypes.CDLL, arguments: ctypes.Structure, tensors: dict[str, Tensor], *names: str) -> None:
    """Runs the kernels on `tensors`, by the names of the arguments' buffers; raises what the emulator found."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous()
        # An empty tensor is not a missing one.
        setattr(arguments, name, Buffer(tensor.data_ptr() or 16, tensor.numel() * tensor.element_size()))
    error = library.run(ctypes.byref(arguments), *(name.encode() for name in names))
    if error:
        raise RuntimeError(error.decode())


def call(
    libraries: dict[torch.dtype, ctypes.CDLL], case: Case, tensors: dict[str, Tensor], deterministic: bool = False
):
    """Runs the kernels on `tensors`, by the names of BUFFERS."""
    sizes = [size for shape in case.shapes for size in shape]
    arguments = Arguments(
        **{name: getattr(case, name) for name in "BHDQP"},
        S=case.cells,
        L=len(case.shapes),
        shapes=(ctypes.c_int64 * len(sizes))(*sizes),
        deterministic=deterministic,
        **{name: int(getattr(case, name)) for name in FLAGS if name != "deterministic"},
    )
    if case.unaligned:
        moved = {name: tensors[name] for name in ("value", "grad") if name in tensors}
        tensors = tensors | {name: torch.cat((t.new_zeros(1), t.flatten()))[1:] for name, t in moved.items()}
    run_on_host(libraries[case.dtype], arguments, tensors)


def forward(libraries, case: Case, inputs: dict[str, Tensor], *size: int) -> Tensor:
    """The output, the same bits in whatever order the lanes of a warp run."""
    outs = []
    for last_lane_first in (False, True):
        outs.append(empty(*size, dtype=case.dtype))
        call(libraries, replace(case, last_lane_first=last_lane_first), {**inputs, "out": outs[-1]})
    assert torch.equal(*outs)
    return outs[0]


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.full(size, float("nan"), dtype=dtype)


def backward(libraries, case: Case, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, after a look that both ways to sum by value agree, and that the ordered one gives the same bits."""
    results = []
    for deterministic, last_lane_first in ((False, False), (True, False), (True, True)):
        grads = {name: tensor.clone() for name, tensor in outputs.items()}
        ordered = replace(case, last_lane_first=last_lane_first)
        call(libraries, ordered, {**inputs, **grads}, deterministic=deterministic)
        results.append(grads)
    for name in outputs:
        close(results[1][name], results[0][name], TOLERANCE[case.real])
        assert torch.equal(results[1][name], results[2][name])
    return results[0]


def check_points(libraries, case: Case, weighted: bool) -> None:
    """deform_sample against the reference in float64."""
    value, (locations, weights) = case.value(), case.points()
    inputs = {"value": value, "locations": locations} | ({"weights": weights} if weighted else {})
    exact = [value.double(), case.shapes, locations.double(), weights.double() if weighted else None]
    out = forward(libraries, case, inputs, *(locations.shape[:3] if weighted else locations.shape[:5]), case.D)
    close(out, reference.deform_sample(*exact, align_corners=case.align_corners), TOLERANCE[case.dtype])

    grad = case.grad(*out.shape)
    outputs = {
        "grad_value": torch.zeros(value.shape, dtype=case.real),
        "grad_locations": empty(*locations.shape, dtype=case.real),
    }
    if weighted:
        outputs["grad_weights"] = empty(*weights.shape, dtype=case.real)
    ours = backward(libraries, case, {**inputs, "grad": grad}, outputs)
    theirs = reference.deform_sample_backward(grad.double(), *exact, align_corners=case.align_corners)
    for name, grad_reference in zip(outputs, theirs, strict=False):
        close(ours[name], grad_reference, TOLERANCE[case.real])


def check_attention(libraries, case: Case) -> None:
    """ms_deform_attn against the reference in float64."""
    value, (points, offsets, logits) = case.value(), case.attention()
    inputs = {"value": value, "reference": points, "offsets": offsets, "logits": logits}
    leaves = [tensor.double().requires_grad_() for tensor in inputs.values()]
    exact = reference.ms_deform_attn(leaves[0], case.shapes, *leaves[1:])
    out = forward(libraries, case, inputs, case.B, case.Q, case.H, case.D)
    close(out, exact.detach(), TOLERANCE[case.dtype])

    grad = case.grad(*out.shape)
    outputs = {
        "grad_value": torch.zeros(value.shape, dtype=case.real),
        "grad_reference": empty(*points.shape, dtype=case.real),
        "grad_offsets": empty(*offsets.shape, dtype=offsets.dtype),
        "grad_logits": empty(*logits.shape, dtype=logits.dtype),
    }
    ours = backward(libraries, case, {**inputs, "grad": grad}, outputs)
    # Where nothing is sampled the reference does not touch its arguments.
    grad_reference = torch.autograd.grad(exact, leaves, grad.double(), allow_unused=True, materialize_grads=True)
    for name, theirs in zip(outputs, grad_reference, strict=True):
        close(ours[name], theirs, TOLERANCE[outputs[name].dtype])


every_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("D", SPECIAL_CHANNELS + OTHER_CHANNELS)
def test_every_number_of_channels(libraries, D, dtype):
    case = Case(D=D, dtype=dtype)
    check_points(libraries, case, weighted=True)
    check_points(libraries, case, weighted=False)
    check_attention(libraries, case)


@every_dtype
@pytest.mark.parametrize(("L", "P"), [(1, 1), (1, 4), (2, 4), (3, 4), (4, 4), (1, 9), (5, 7)])
def test_every_number_of_samples(libraries, L, P, dtype):
    shapes = ((4, 6), (3, 3), (1, 5), (2, 2), (5, 1))[:L]
    case = Case(D=32, H=2, P=P, shapes=shapes, dtype=dtype, narrow=True, boxes=True)
    check_points(libraries, case, weighted=True)
    check_points(libraries, case, weighted=False)
    check_attention(libraries, case)


CASES = {
    "align_corners": Case(align_corners=True, D=8),
    "dat": Case(align_corners=True, P=1, shapes=((9, 4),), D=64, Q=37),
    "unaligned": Case(unaligned=True),
    "unaligned-half": Case(unaligned=True, dtype=torch.float16, D=64, narrow=True),
    "points-narrow": Case(dtype=torch.bfloat16, narrow=True),
    "boxes-wide": Case(dtype=torch.float16, boxes=True),
    "many-images": Case(B=7, Q=3, H=1, D=16),
    "odd-queries": Case(B=3, Q=67, H=1, D=16, P=1),
    "empty-level": Case(shapes=((0, 3), (2, 2), (4, 0)), D=8),
    "no-cells": Case(shapes=((0, 3),), D=8),
    "no-images": Case(B=0),
    "no-queries": Case(Q=0),
    "no-points": Case(P=0),
    "no-heads": Case(H=0),
    "no-channels": Case(D=0),
    # Queries that are the levels' cells go by tiles: of fewer queries for small calls, of all for large ones.
    "tiles": Case(shapes=((9, 17), (5, 9), (3, 2)), Q=204, H=1, P=1),
    "tiles-wide-rows": Case(shapes=((9, 10), (0, 5), (1, 3)), Q=93, H=1, P=1, D=128),
    "tiles-short-rows": Case(shapes=((9, 10),), Q=90, H=1, P=1, D=8, dtype=torch.bfloat16),
    "tiles-large": Case(shapes=((9, 10),), Q=90, B=32, H=8, P=1, D=8),
    # Blocks of every size.
    "many-blocks": Case(B=128, H=8, Q=3, P=1, D=32, shapes=((2, 3),)),
    "some-blocks": Case(B=64, H=8, Q=9, P=1, D=32, shapes=((2, 3),)),
    # Samples sorted a few at a time, of a few images and of a few queries.
    "small-batches": Case(max_batch=100, Q=9, D=8),
    "smallest-batches": Case(max_batch=1, D=8),
    "small-grids": Case(max_grid=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_calls(libraries, case):
    check_points(libraries, case, weighted=True)
    check_points(libraries, case, weighted=False)
    if case.P:
        # Without samples the reference's softmax has nothing to work on.
        check_attention(libraries, case)


def test_no_samples_give_zero(libraries):
    case = Case(P=0)
    value, (points, offsets, logits) = case.value(), case.attention()
    inputs = {"value": value, "reference": points, "offsets": offsets, "logits": logits}
    out = forward(libraries, case, inputs, case.B, case.Q, case.H, case.D)
    assert not out.any()
    outputs = {
        "grad_value": torch.zeros_like(value),
        "grad_reference": torch.full_like(points, float("nan")),
        "grad_offsets": offsets,
        "grad_logits": logits,
    }
    ours = backward(libraries, case, {**inputs, "grad": out}, outputs)
    assert not ours["grad_value"].any()
    assert not ours["grad_reference"].any()


WILD = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, -3e9, 1.5, -0.5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wild_locations_sample_zero_and_get_no_gradient(libraries, dtype, axis):
    # The map holds NaN: what lies outside of it is not read, not even to be multiplied by zero.
    case = Case(B=1, H=1, D=8, Q=len(WILD), P=1, shapes=((3, 4),), dtype=dtype)
    value = torch.full((1, 12, 1, 8), float("nan"), dtype=dtype)
    wild = torch.full((1, len(WILD), 1, 1, 1, 2), 0.5)
    wild[0, :, 0, 0, 0, axis] = torch.tensor(WILD)
    ones = torch.ones(1, len(WILD), 1, 1, 1)
    grad_value = torch.zeros(1, 12, 1, 8)
    sources = (
        ({"locations": wild, "weights": ones}, {"grad_locations": wild, "grad_weights": ones}),
        ({"locations": wild}, {"grad_locations": wild}),
        (
            {"reference": wild[:, :, 0, :, 0], "offsets": torch.zeros_like(wild), "logits": ones},
            {"grad_reference": wild[:, :, 0, :, 0], "grad_offsets": wild, "grad_logits": ones},
        ),
    )
    for inputs, grads in sources:
        inputs = {name: tensor.contiguous() for name, tensor in inputs.items()} | {"value": value}
        out = empty(1, len(WILD), 1, 8, dtype=dtype)
        call(libraries, case, {**inputs, "out": out})
        assert not out.any()
        outputs = {name: torch.full(tensor.shape, float("nan")) for name, tensor in grads.items()}
        ours = backward(libraries, case, {**inputs, "grad": torch.ones_like(out)}, outputs | {"grad_value": grad_value})
        assert not any(grad.any() for grad in ours.values())


def untouched(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to."""
    size = count * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


@pytest.mark.parametrize(("B", "width"), [(3, 1 << 13), (1, 1 << 14)], ids=["images", "rows-of-one-level"])
def test_more_elements_than_32_bits_count(libraries, B, width):
    case = Case(B=B, H=1024, D=128, Q=1, P=1, shapes=((2, width),), dtype=torch.bfloat16)
    shape = (B, 2 * width, case.H, case.D)
    value = untouched(math.prod(shape), torch.bfloat16).view(shape)
    # The middle of the last four cells of every image.
    corners = torch.tensor([width - 2, width - 1, 2 * width - 2, 2 * width - 1])
    value[:, corners] = torch.arange(1.0, 5.0, dtype=torch.bfloat16).view(-1, 1, 1)
    locations = torch.tensor([1 - 1 / width, 0.5]).expand(*case.layout(), 2).contiguous()
    inputs = {"value": value, "locations": locations, "weights": torch.ones(case.layout())}
    out = empty(B, 1, case.H, case.D, dtype=torch.bfloat16)
    call(libraries, case, {**inputs, "out": out})
    assert torch.equal(out, torch.full_like(out, 2.5))
    grad_value = untouched(math.prod(shape), torch.float32).view(shape)
    grad_weights = torch.zeros(case.layout())
    grads = {"grad_value": grad_value, "grad_locations": locations.clone(), "grad_weights": grad_weights}
    call(libraries, case, {**inputs, "grad": torch.ones_like(out), **grads})
    assert torch.equal(grad_value[:, corners], torch.full((B, 4, *shape[2:]), 0.25))
    assert torch.equal(grad_weights, torch.full_like(grad_weights, 2.5 * case.D))


def test_every_mistake_is_found(tmp_path):
    library = build(tmp_path / "mistakes.so", "mistakes.cpp", function="run_mistake")
    messages = (
        "access of 4 bytes at 256 of a buffer of 256",
        "access of 4 bytes at -4 of",
        "access of 16 bytes at 128 of a buffer of 140",
        "not aligned to 16",
        "index 32 of 32 in shared memory",
        "the first of its warp at",
        "thread 0 of block (0, 0, 0) has left the others behind",
        "thread 0 of block (0, 0, 0) has left the others behind",
        "the first of its block at",
    )
    numbers = torch.zeros(64)

    def run(which: int) -> str:
        return (library.run_mistake(which, ctypes.c_void_p(numbers.data_ptr())) or b"").decode()

    for which, message in enumerate(messages):
        assert message in run(which)
    expected = (torch.arange(64) ^ 31).float()
    # Shared memory that no lane has written yet is NaN.
    assert run(len(messages)) == ""
    assert numbers.isnan().any()
    assert run(len(messages) + 1) == ""
    assert torch.equal(numbers, expected)
