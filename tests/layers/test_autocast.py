"""Casts of a block's parameters together give what autocast's own casts give, to the bit."""

import copy
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import dat  # noqa: F401
import dat.layers.autocast as casts
from dat.layers.autocast import _parameters_to_cast, casts_parameters_together


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 4), nn.Linear(4, 3), nn.LayerNorm(3)
        self.seen = None

    @casts_parameters_together
    def forward(self, x, fail=False):
        self.seen = self.first.weight.dtype, self.second.bias.dtype, self.norm.weight.dtype
        self.wanted = self.first.weight.requires_grad, self.first.bias.requires_grad
        if fail:
            raise RuntimeError("stop")
        return self.norm(self.second(self.first(x)))


def gradients(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_loss_and_the_gradients_of_autocast_to_the_bit(checkpointing, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("dat_pp_nano", img_size=64, num_classes=5).train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(2, 3, 64, 64)
    calls = []
    original = casts._Cast.apply
    monkeypatch.setattr(casts._Cast, "apply", lambda *args: calls.append(len(args)) or original(*args))
    torch.manual_seed(1)
    loss, ours = gradients(model, x)
    assert len(calls) >= sum(len(stage.blocks) for stage in model.stages)
    monkeypatch.setattr(casts, "is_traced", lambda args: True)
    torch.manual_seed(1)
    expected, theirs = gradients(model, x)
    assert torch.equal(loss, expected)
    for name, grad in theirs.items():
        assert (ours[name] is None) == (grad is None), name
        assert grad is None or (ours[name].dtype == torch.float32 and torch.equal(ours[name], grad)), name


def test_layers_hold_copies_only_while_the_block_runs_and_their_own_after_an_error():
    model = Pair()
    before = list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 6))
        assert model.seen == (torch.bfloat16, torch.bfloat16, torch.float32)
        with pytest.raises(RuntimeError, match="stop"):
            model(torch.randn(2, 6), fail=True)
    after = list(model.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_threads_that_predict_and_float32_see_the_parameters_themselves(monkeypatch):
    model = Pair()
    model(torch.randn(2, 6))
    assert model.seen[0] == torch.float32
    for threads, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        monkeypatch.setattr(threading, "active_count", lambda threads=threads: threads)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 6))
        assert model.seen[0] == dtype
    # Graphs are captured without autocast's cache.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model(torch.randn(2, 6))
    assert model.seen[0] == torch.bfloat16


def test_frozen_and_unused_parameters_and_subclasses_are_left_as_autocast_leaves_them():
    class Adapted(nn.Linear):
        def forward(self, x):
            assert self.weight.dtype == torch.float32
            return super().forward(x)

    model = Pair()
    model.unused = nn.Linear(2, 2)
    model.second = Adapted(4, 3)
    model.first.weight.requires_grad_(False)
    parametrize.register_parametrization(model.first, "bias", nn.Identity())
    loss, grads = gradients(model, torch.randn(2, 6))
    assert loss.isfinite()
    assert model.wanted == (False, True)
    assert grads["first.weight"] is None
    assert grads["unused.weight"] is None
    assert grads["unused.bias"] is None
    assert grads["second.weight"] is not None
    assert grads["first.parametrizations.bias.original"] is not None


def test_second_derivatives_and_torch_func():
    model = Pair()
    x = torch.randn(2, 6)

    def penalty(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), model.first.weight)[0]

    plain = copy.deepcopy(model)
    plain.forward = Pair.forward.__wrapped__.__get__(plain)
    torch.testing.assert_close(penalty(model), penalty(plain), rtol=2e-2, atol=1e-3)

    def loss(parameters):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert grads["first.weight"].dtype == torch.float32
    assert grads["first.weight"].abs().sum() > 0


def test_compiled_blocks_have_the_same_results():
    torch._dynamo.reset()
    model = Pair()
    x = torch.randn(2, 6)
    _, expected = gradients(model, x)
    _, ours = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for (name, grad), other in zip(expected.items(), ours.values(), strict=True):
        torch.testing.assert_close(grad, other, rtol=2e-2, atol=1e-3, msg=name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=1e-2)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    @casts_parameters_together
    def forward(self, x):
        assert self.attn.in_proj_weight.dtype == torch.bfloat16
        assert self.attn.out_proj.bias.dtype == torch.bfloat16
        return self.attn(x, x, x, need_weights=False)[0]


def test_multi_head_attention_has_the_gradients_of_autocast_to_the_bit():
    torch.manual_seed(0)
    model, x = Attends(), torch.randn(2, 5, 8)
    _, ours = gradients(model, x)
    model.forward = lambda x: model.attn(x, x, x, need_weights=False)[0]
    _, theirs = gradients(model, x)
    assert all(torch.equal(ours[name], grad) for name, grad in theirs.items())


class Disables(nn.Module):
    """A module of a user, in a block of ours, that turns autocast off for its layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.inner(x.float())


def test_modules_of_others_may_turn_autocast_off():
    model = Pair()
    model.second = Disables()
    model.second.bias = nn.Parameter(torch.zeros(3))
    _, grads = gradients(model, torch.randn(2, 6))
    assert grads["second.inner.weight"].abs().sum() > 0
    assert model.seen[0] == torch.bfloat16


def test_parts_with_another_forward_or_compiled_by_themselves_are_left_alone():
    for touch in (
        lambda layer: setattr(layer, "forward", lambda x: nn.functional.linear(x.float(), layer.weight)),
        lambda layer: layer.compile(backend="eager"),
    ):
        model = Pair()
        outer = nn.Sequential(model.first)
        touch(outer)
        assert not _parameters_to_cast(nn.Sequential(outer), torch.device("cpu"))
        assert _parameters_to_cast(model, torch.device("cpu"))


def test_layers_with_hooks_and_parameters_with_hooks_or_owners_are_left_alone():
    mask = torch.arange(24).reshape(4, 6) % 2
    for touch in (
        lambda model: model.first.register_forward_pre_hook(lambda layer, args: layer.weight.data.mul_(mask)),
        lambda model: model.first.weight.register_hook(lambda grad: grad.clamp(-1, 1)),
        lambda model: model.first.weight.register_post_accumulate_grad_hook(lambda parameter: None),
        # Shards of FSDP and ZeRO are told by their attributes.
        lambda model: setattr(model.first.weight, "_fsdp_flattened", True),
        lambda model: setattr(model.first, "forward", lambda x: nn.functional.linear(x.float(), model.first.weight)),
    ):
        model = Pair()
        touch(model)
        _, grads = gradients(model, torch.randn(2, 6))
        assert model.seen[:2] == (torch.float32, torch.bfloat16)
        assert grads["first.weight"] is not None
        model.first.weight.data.add_(1)


def test_no_gradient_at_all_and_an_interrupted_start():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(2, 6), None

    model, x = Pair(), torch.randn(2, 6, requires_grad=True)
    model.norm = nn.Identity()
    with torch.autocast("cpu", torch.bfloat16):
        run = casts_parameters_together(lambda self, x: Nothing.apply(x, self.first.weight))
        run(model, x).backward()
    assert model.first.weight.grad is None
    assert torch.equal(x.grad, torch.ones(2, 6))

    class Stops(dict):
        def __setitem__(self, name, value):
            if value is not None and value.dtype == torch.bfloat16:
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    model.second.__dict__["_parameters"] = Stops(model.second._parameters)
    with pytest.raises(KeyboardInterrupt), torch.autocast("cpu", torch.bfloat16):
        run(model, x)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.parametrize("name", ["dat_pp_nano", "dat_tiny"])
def test_weights_in_half_precision_under_the_autocast_of_gpus(name):
    """There, norms return float32."""

    def norm(x, shape, weight=None, bias=None, eps=1e-5, _=True):
        with torch.autocast("cpu", enabled=False):
            wide = (None if t is None else t.float() for t in (weight, bias))
            return nn.functional.layer_norm(x.float(), shape, *wide, eps)

    model = timm.create_model(name, num_classes=5, img_size=64).bfloat16().eval()
    with torch.library._scoped_library("aten", "IMPL") as implementation:
        implementation.impl("layer_norm", norm, "AutocastCPU")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(torch.randn(1, 3, 64, 64).bfloat16()).isfinite().all()
