"""Eager calls go around torch.library's wrapper of derivatives; whatever traces sees the registered ops."""

import pytest
import torch
from ops.samples import Sample
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dat.ops import _common, deform_sample, ms_deform_attn

SAMPLE = Sample(B=1, D=4, dtype=torch.float64)


def sampling(value, locations, weights):
    return deform_sample(value, SAMPLE.shapes, locations, weights)


def attention(value, locations, weights):
    return ms_deform_attn(value, SAMPLE.shapes, locations.mean((2, 4)), locations, weights)


both = pytest.mark.parametrize("function", [sampling, attention])


def derivatives(function):
    """Output, gradients, and gradients of those."""
    leaves = [t.requires_grad_() for t in SAMPLE.tensors()]
    out = function(*leaves)
    firsts = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(first.square().sum() for first in firsts), leaves)
    return out, *firsts, *seconds


@both
def test_short_cut_has_the_derivatives_of_the_registered_op(function, monkeypatch):
    ours = derivatives(function)
    monkeypatch.setattr(_common, "is_traced", lambda args: True)
    theirs = derivatives(function)
    assert "Generated" not in ours[0].grad_fn.name()
    assert "Generated" in theirs[0].grad_fn.name()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@both
def test_short_cut_makes_no_graph_where_none_is_wanted(function):
    tensors = SAMPLE.tensors()
    assert not function(*tensors).requires_grad
    with torch.no_grad():
        assert not function(tensors[0].requires_grad_(), *tensors[1:]).requires_grad
    with torch.inference_mode():
        assert function(*tensors).is_inference()


@both
def test_a_default_device_is_not_taken_for_a_tracer(function):
    with torch.device("cpu"):
        assert "Generated" not in derivatives(function)[0].grad_fn.name()
        subclass = SAMPLE.tensors()[0].as_subclass(type("Marked", (torch.Tensor,), {}))
        assert _common.is_traced((subclass,))
        assert _common.is_traced((torch.fx.Proxy(torch.fx.Graph().placeholder("x")),))
    tensors = SAMPLE.tensors()
    with torch.overrides.BaseTorchFunctionMode(), torch.device("cpu"):
        assert _common.is_traced(tensors)
    assert not _common.is_traced(tensors)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@both
def test_modes_subclasses_and_graphs_see_the_registered_ops(function):
    name = "deform_sample" if function is sampling else "ms_deform_attn"
    leaves = [t.requires_grad_() for t in SAMPLE.tensors()]
    with Recorder() as recorder:
        torch.autograd.grad(function(*leaves).sum(), leaves)
    assert {f"dat.{name}.default", f"dat.{name}_backward.default"} <= set(recorder.seen)

    function(leaves[0].detach().as_subclass(Subclass), *leaves[1:])
    assert any(name in seen for seen in Subclass.seen)

    graph = make_fx(lambda *tensors: torch.autograd.grad(function(*tensors).sum(), tensors))(*leaves)
    assert f"torch.ops.dat.{name}_backward.default" in graph.code
