"""Optimizer groups, learning rates, schedules, averaged weights and gradients."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim._param_groups import auto_group_layers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dat.utils.errors import ConfigError
from dat.utils.finite import check_finite


def scaled_lr(lr: float, images: int, reference: int, rule: str = "sqrt") -> float:
    """The learning rate for `images` a step of one that was found with `reference` a step; 0: the same at any number.

    Args:
        rule: "sqrt", which keeps Adam's path (Malladi et al., arXiv:2205.10287), or "linear" (Goyal et al.,
            arXiv:1706.02677), which many recipes use.
    """
    if reference == 0:
        return lr
    return lr * (images / reference) ** {"sqrt": 0.5, "linear": 1.0}[rule]


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Factors on the learning rates of a timm model's parameters by name: x `decay` for each layer below the head.

    What a layer is is the model's own group_matcher; BEiT's scheme (arXiv:2106.08254).
    """
    if hasattr(model, "group_matcher"):
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(model)
    top = max(layers.values())
    return {name: decay ** (top - layers.get(name, top)) for name, _ in model.named_parameters()}


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    multipliers: dict[str, float] | None = None,
    scales: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups by learning rate factor and weight decay.

    Biases, one-dimensional parameters and those that a (sub)module's no_weight_decay() names are not decayed.

    Args:
        model: its parameters that require gradients are grouped.
        lr: base learning rate.
        weight_decay: of the other parameters.
        multipliers: {regular expression: factor on the learning rate}; the first that is found in a name counts.
        scales: {name of a parameter: another factor on its learning rate}, see layer_scales.
    Raises:
        ConfigError: an expression matches no parameter.
    """
    multipliers, scales = multipliers or {}, scales or {}
    patterns = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for pattern in module.no_weight_decay()
    ]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        match = next((pattern for pattern in multipliers if re.search(pattern, name)), None)
        used.add(match)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch.fnmatch(name, p) for p in patterns)
        scale = (1.0 if match is None else multipliers[match]) * scales.get(name, 1.0)
        groups.setdefault((scale, 0.0 if plain else weight_decay), []).append(parameter)
    for pattern in multipliers:
        if pattern not in used:
            raise ConfigError(f"learning rate multiplier {pattern!r} matches no parameter that is trained")
    return [
        {"params": parameters, "lr": lr, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    kind: str = "cosine",
    decay_steps: Sequence[int] = (),
    decay_rate: float = 0.1,
    min_lr: float = 0.0,
) -> Scheduler:
    """Schedule in optimizer steps, without state: call scheduler.step_update(finished steps) before each step.

    Args:
        optimizer: its groups' "lr_scale" multiplies their rate.
        total_steps: steps of the whole run.
        warmup_steps: linear from 0 (excluded) to the base rate; counted in total_steps.
        kind: "cosine" down to min_lr, or "step": x decay_rate after each of decay_steps steps.
    """
    warmup_steps = min(warmup_steps, total_steps)
    base = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    # the first step already moves: a rate of 0 would waste it
    warmup = {"warmup_t": warmup_steps, "warmup_lr_init": base / (warmup_steps + 1), "warmup_prefix": False}
    if kind == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total_steps, lr_min=min_lr, t_in_epochs=False, **warmup)
    if kind != "step":
        raise ConfigError(f"schedule is {kind!r}, should be 'cosine' or 'step'")
    # timm applies a milestone one count early
    milestones = [step + 1 for step in sorted(decay_steps)]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=decay_rate, t_in_epochs=False, **warmup)


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """Moving average of the weights, timm's, with its decay warmed up so that short runs use it too; None at decay 0.

    Call ema.update(model, step=finished steps) after each step.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True) if decay > 0 else None


def clip_gradients(model: nn.Module, limit: float, where: str) -> Tensor:
    """Clips the total norm of the gradients to `limit` (0: not at all); returns the norm before clipping.

    Raises:
        NonFiniteError: names the first gradient that holds NaN or infinity; the weights are untouched.
    """
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norm = _whole(nn.utils.get_total_norm([gradient for _, gradient in gradients]))
    if not torch.isfinite(norm):
        check_finite(((f"the gradient of {name}", _whole(gradient)) for name, gradient in gradients), where)
        check_finite([("the norm of the gradients", norm)], where)
    if limit > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a share, see dat.engine.fsdp."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def amp_context(device: torch.device, amp: str) -> torch.autocast:
    """Autocast to bfloat16 when amp is "bf16"; does nothing when it is "none". bfloat16 needs no loss scaler."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")
