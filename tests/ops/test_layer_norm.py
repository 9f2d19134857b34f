"""layer_norm: its CUDA kernels on the host, its derivatives, and the layers that it stands in for."""

import copy
import ctypes
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
from ops import samples
from ops.samples import drawn, empty_like
from ops.test_cuda_kernels_on_host import Buffer, build, run_on_host
from torch import Tensor, nn
from torch.nn import functional as F

from dat.layers.norm import add_layer_norm, is_fused
from dat.layers.norm import layer_norm as layer
from dat.ops import layer_norm as fused

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
# The dtypes of maps and of their norms, and of branches and the norms of sums.
PAIRS = [(FLOAT, FLOAT), (FLOAT, BFLOAT), (FLOAT, HALF), (BFLOAT, FLOAT), (HALF, FLOAT)]
BRANCHES = [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, FLOAT), (HALF, FLOAT)]
BUFFERS = (
    *("x", "branch", "weight", "bias", "sum", "out", "grad", "grad_sum"),
    *("grad_x", "grad_branch", "grad_weight", "grad_bias"),
)
# Errors that are allowed, relative to the largest value: kernels sum in float32 and round once.
TOLERANCE = {FLOAT: 2e-6, BFLOAT: 2**-8, HALF: 2**-11}
LINEAR = nn.Linear(1, 1)
close = partial(samples.close, least=1.0)


class Arguments(ctypes.Structure):
    """The same fields as in layer_norm.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "C", "processors", "last_lane_first")),
        ("eps", ctypes.c_double),
        *((name, Buffer) for name in BUFFERS),
    ]


@dataclass(frozen=True)
class Case:
    rows: int
    C: int
    dtype: torch.dtype = FLOAT
    of_norm: torch.dtype = FLOAT
    branch: torch.dtype | None = None
    with_weight: bool = True
    eps: float = 1e-5
    # Multiprocessors of the device: the parts that the weight's gradient is summed in.
    processors: int = 1


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("cuda_host") / "layer_norm.so", "layer_norm.cpp")


def call(library: ctypes.CDLL, case: Case, tensors: dict[str, Tensor], last_lane_first: bool) -> None:
    sizes = {name: getattr(case, name) for name in ("rows", "C", "processors", "eps")}
    branch = case.branch or (case.of_norm if case.dtype == FLOAT else FLOAT)
    arguments = Arguments(**sizes, last_lane_first=last_lane_first)
    run_on_host(library, arguments, tensors, f"{case.dtype} {branch} {case.of_norm}")


def rows_of(C: int) -> int:
    """More rows than the blocks of one processor take at a time, and no multiple of them."""
    return 3 * 4096 // C + 5


def check(library: ctypes.CDLL, case: Case) -> None:
    """Forward and gradients against float64, and the same bits in whatever order threads run."""
    x = drawn(case.rows, case.C).to(case.dtype)
    parameters = {"weight": drawn(case.C, seed=1), "bias": drawn(case.C, seed=2)}
    branch = {"branch": drawn(case.rows, case.C, seed=3).to(case.branch)} if case.branch else {}
    grads = {"grad": drawn(case.rows, case.C, seed=4).to(case.of_norm)}
    if case.branch:
        grads["grad_sum"] = drawn(case.rows, case.C, seed=5)
    total = x + branch["branch"] if case.branch else x
    results = []
    for last_lane_first in (False, True):
        outs = {"out": empty_like(x).to(case.of_norm)} | ({"sum": empty_like(x)} if case.branch else {})
        call(library, case, {"x": x} | branch | parameters | outs, last_lane_first)
        found = {"grad_x": empty_like(x)}
        if case.branch not in (None, case.dtype):
            found["grad_branch"] = empty_like(branch["branch"])
        if case.with_weight:
            found |= {f"grad_{name}": empty_like(t) for name, t in parameters.items()}
        call(library, case, {"x": total, "weight": parameters["weight"]} | grads | found, last_lane_first)
        results.append(outs | found)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    found = results[0]
    leaves = [t.double().requires_grad_() for t in (total, *parameters.values())]
    exact = F.layer_norm(leaves[0], (case.C,), *leaves[1:], case.eps)
    theirs = torch.autograd.grad(exact, leaves, grads["grad"].double())
    close(found["out"], exact.detach(), TOLERANCE[case.of_norm])
    grad_x = theirs[0] + grads.get("grad_sum", 0.0)
    close(found["grad_x"], grad_x, TOLERANCE[case.dtype])
    if case.branch:
        assert torch.equal(found["sum"], total)
    if "grad_branch" in found:
        assert torch.equal(found["grad_branch"], found["grad_x"].to(case.branch))
    if case.with_weight:
        close(found["grad_weight"], theirs[1], 2e-6)
        close(found["grad_bias"], theirs[2], 2e-6)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("C", [4, 12, 32, 96, 256, 260, 384, 512])
def test_kernels_equal_float64(library, C, dtypes):
    check(library, Case(rows_of(C), C, *dtypes))


@pytest.mark.parametrize("dtypes", BRANCHES, ids=str)
@pytest.mark.parametrize("C", [12, 64, 256, 512])
def test_kernels_of_sums_equal_float64(library, C, dtypes):
    branch, of_norm = dtypes
    check(library, Case(rows_of(C), C, FLOAT, of_norm, branch))


CASES = {
    "one-row": Case(1, 64),
    "no-rows": Case(0, 64),
    "no-rows-with-branch": Case(0, 64, FLOAT, BFLOAT, branch=BFLOAT),
    "frozen": Case(9, 64, FLOAT, BFLOAT, branch=BFLOAT, with_weight=False),
    "no-eps": Case(3, 96, eps=0.0),
    "more-blocks-than-rows": Case(5, 64, processors=132),
    "many-parts": Case(700, 128, processors=30),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_calls(library, case):
    check(library, case)


def test_a_mean_far_from_zero(library):
    case = Case(9, 256)
    x, weight, bias = drawn(9, 256) + 256.0, drawn(256, seed=1), drawn(256, seed=2)
    out = empty_like(x)
    call(library, case, {"x": x, "weight": weight, "bias": bias, "out": out}, False)
    # The mean alone is rounded by up to 2**-16.
    close(out, F.layer_norm(x.double(), (256,), weight.double(), bias.double()), 2**-15)


def test_infinity_and_nan_stay_in_their_rows(library):
    case = Case(9, 64, FLOAT, BFLOAT, branch=BFLOAT)
    x, parameters = drawn(9, 64), {"weight": drawn(64, seed=1), "bias": drawn(64, seed=2)}
    x[2, 5], x[7, 0] = float("inf"), float("nan")
    outs = {"sum": empty_like(x), "out": empty_like(x).to(BFLOAT)}
    call(library, case, {"x": x, "branch": drawn(9, 64, seed=3).to(BFLOAT)} | parameters | outs, False)
    assert outs["out"].isfinite().all(1).nonzero().flatten().tolist() == [0, 1, 3, 4, 5, 6, 8]


@pytest.fixture
def calls(monkeypatch):
    """Makes the CPU the device of the raw ops, in torch's norm; the names of those that are called."""
    called = []

    def forward(x, branch, weight, bias, eps, dtype):
        called.append("norm" if branch is None else "norm of a sum")
        total = x if branch is None else x + branch
        out = F.layer_norm(total.float(), weight.shape, weight, bias, eps).to(dtype)
        return out, x.new_empty(0) if branch is None else total

    def backward(grad, grad_sum, x, weight, eps, branch, with_weight):
        called.append("backward" if with_weight else "backward of x")
        wide = x.float()
        mean, scale = wide.mean(-1, keepdim=True), (wide.var(-1, keepdim=True, correction=0) + eps).rsqrt()
        shape, mask = weight.shape, [True, with_weight, with_weight]
        grads = torch.ops.aten.native_layer_norm_backward(grad.float(), wide, shape, mean, scale, weight, weight, mask)
        grad_x = grads[0] if grad_sum is None else grads[0] + grad_sum
        grad_branch = grad.new_empty(0) if branch is None else grad_x.to(branch)
        return grad_x.to(x.dtype), grad_branch, *(grads[1:] if with_weight else [weight.new_empty(0)] * 2)

    monkeypatch.setattr(fused, "DEVICE", "cpu")
    monkeypatch.setattr(fused, "BUILT", True)
    with torch.library._scoped_library("dat", "IMPL") as implementation:
        implementation.impl("layer_norm", forward, "CPU")
        implementation.impl("layer_norm_backward", backward, "CPU")
        yield called


def norm_of(C: int = 8, kind: type[nn.Module] = nn.LayerNorm, **options) -> nn.Module:
    norm = kind(C, **options)
    for seed, parameter in enumerate(norm.parameters(), 7):
        parameter.data = drawn(*parameter.shape, seed=seed).to(parameter.dtype)
    return norm


def derivatives(function, inputs):
    """Outputs, gradients, and gradients of those."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = function(*leaves)
    cotangents = [drawn(*out.shape, seed=4 + i).to(out.dtype) for i, out in enumerate(outs)]
    plain = torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)
    loss = sum(out.float().pow(3).sum() for out in outs)
    firsts = torch.autograd.grad(loss, leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(first.float().square().sum() for first in firsts), leaves)
    return [t.detach() for t in (*outs, *plain, *firsts, *seconds)]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_derivatives_of_any_order(dtypes):
    dtype, of_norm = dtypes
    inputs = [drawn(3, 5, 8).to(dtype), drawn(8, seed=1), drawn(8, seed=2)]
    ours = derivatives(lambda x, weight, bias: [fused.layer_norm(x, weight, bias, 1e-5, of_norm)], inputs)
    assert (ours[0].dtype, ours[1].dtype) == (of_norm, dtype)
    theirs = derivatives(lambda x, *parameters: [F.layer_norm(x, (8,), *parameters)], [t.double() for t in inputs])
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 40 * max(TOLERANCE[dtype], TOLERANCE[of_norm]))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtypes", BRANCHES, ids=str)
def test_derivatives_of_sums(dtypes):
    dtype, of_norm = dtypes
    inputs = [drawn(3, 5, 8), drawn(3, 5, 8, seed=3).to(dtype), drawn(8, seed=1), drawn(8, seed=2)]
    ours = derivatives(lambda *tensors: fused.add_layer_norm(*tensors, 1e-5, of_norm), inputs)
    assert [t.dtype for t in ours[:4]] == [FLOAT, of_norm, FLOAT, dtype]

    def exact(x, branch, weight, bias):
        return x + branch, F.layer_norm(x + branch, (8,), weight, bias)

    for one, other in zip(ours, derivatives(exact, [t.double() for t in inputs]), strict=True):
        close(one, other, 40 * max(TOLERANCE[dtype], TOLERANCE[of_norm]))


@pytest.mark.usefixtures("calls")
def test_gradients_of_one_result_alone():
    inputs = [t.requires_grad_() for t in (drawn(4, 8), drawn(4, 8, seed=3), drawn(8, seed=1), drawn(8, seed=2))]
    total, normed = fused.add_layer_norm(*inputs, 1e-5, FLOAT)
    grad = drawn(4, 8, seed=4)
    found = torch.autograd.grad(total, inputs[:2], grad, retain_graph=True)
    assert torch.equal(found[0], grad)
    assert torch.equal(found[1], grad)
    found = torch.autograd.grad(normed, inputs, grad)
    theirs = torch.autograd.grad(F.layer_norm(inputs[0] + inputs[1], (8,), *inputs[2:]), inputs, grad)
    for one, other in zip(found, theirs, strict=True):
        close(one, other, 1e-5)


class Other(nn.LayerNorm):
    pass


OTHERS = {
    "subclass": lambda: norm_of(kind=Other),
    "no-bias": lambda: norm_of(bias=False),
    "no-parameters": lambda: norm_of(elementwise_affine=False),
    "two-dimensions": lambda: norm_of((4, 8)),
    "hook": lambda: hooked(norm_of()),
    "identity": nn.Identity,
}


def hooked(norm):
    norm.register_forward_hook(lambda *_: None)
    return norm


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_norms_are_called(calls, make):
    norm, x, branch = make(), drawn(3, 4, 8), drawn(3, 4, 8, seed=3).bfloat16()
    with torch.autocast("cpu", BFLOAT):
        assert torch.equal(layer(norm, x, before=LINEAR), norm(x))
        total, normed = add_layer_norm(norm, x, branch)
        assert torch.equal(total, x + branch)
        assert torch.equal(normed, norm(x + branch))
    assert not calls


def test_maps_that_the_kernels_take(calls, monkeypatch):
    norm, x = norm_of(), drawn(3, 8)
    assert is_fused(norm, x)
    assert is_fused(norm, nn.Parameter(x))
    assert not is_fused(norm, x.bfloat16())
    assert not is_fused(norm, x.double())
    assert not is_fused(norm_of(6), x[:, :6])
    assert not is_fused(norm_of(516), drawn(2, 516))
    assert not is_fused(norm, drawn(3, 9))
    assert not is_fused(norm_of().bfloat16(), x)
    with torch.autocast("cpu", BFLOAT):
        assert is_fused(norm, x.bfloat16())
        assert not is_fused(norm, x.half())
    monkeypatch.setattr(fused, "BUILT", False)
    assert not is_fused(norm, x)
    assert not calls


def test_dtypes_under_autocast(calls):
    norm, x = norm_of(), drawn(3, 8)
    assert layer(norm, x, before=LINEAR).dtype == FLOAT
    with torch.autocast("cpu", BFLOAT):
        assert layer(norm, x).dtype == FLOAT
        assert layer(norm, x, before=LINEAR).dtype == BFLOAT
        assert layer(norm, x.bfloat16(), before=LINEAR).dtype == FLOAT
        assert [t.dtype for t in add_layer_norm(norm, x, x.bfloat16())] == [FLOAT, FLOAT]
        assert [t.dtype for t in add_layer_norm(norm, x, x.bfloat16(), before=LINEAR)] == [FLOAT, BFLOAT]
        calls.clear()
        # A branch in float32, as layer scale makes it, is added first.
        assert [t.dtype for t in add_layer_norm(norm, x, x, before=LINEAR)] == [FLOAT, BFLOAT]
        assert calls == ["norm"]


TRACERS = {
    "compile": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager")(x),
    "export": lambda f, x: torch.export.export(f, (x,), strict=False),
    "jit": lambda f, x: torch.jit.trace(f, x, check_trace=False),
    "fx": lambda f, x: torch.fx.symbolic_trace(f),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = norm_of()

    def forward(self, x):
        return add_layer_norm(self.norm, layer(self.norm, x), x)[1]


@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_tracers_see_torchs_norm(calls, trace):
    module, x = Layer(), drawn(2, 5, 8)
    trace(module, x)
    assert not calls
    module(x)
    assert calls == ["norm", "norm of a sum"]


def test_a_step_of_a_model_equals_torchs(calls, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("dat_pp_nano", num_classes=10, img_size=64)
    x = drawn(2, 3, 64, 64)

    def step(model):
        with torch.autocast("cpu", BFLOAT):
            loss = model(x).float().square().mean()
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    ours = step(copy.deepcopy(model))
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert calls.count("norm of a sum") == blocks
    assert calls.count("backward") == len(calls) // 2
    monkeypatch.setattr(fused, "BUILT", False)
    # CUDA's autocast has norms in float32, which the CPU's does not.
    theirs = step(model)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.1, atol=0)
    found, expected = (torch.cat([t.flatten() for t in tensors[1:]]) for tensors in (ours, theirs))
    assert (found - expected).norm() < 0.1 * expected.norm()
