"""Optimizer groups, learning rates, schedules, averaged weights and gradients."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers, create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dat.utils.errors import ConfigError
from dat.utils.finite import check_finite


def scaled_lr(lr: float, images: int, reference: int, rule: str = "sqrt") -> float:
    """Scales a learning rate for `reference` images per step to `images` per step; `reference` 0: no scaling.

    Args:
        rule: "sqrt", which keeps Adam's path (Malladi et al., arXiv:2205.10287), or "linear" (Goyal et al.,
            arXiv:1706.02677).
    """
    if reference == 0:
        return lr
    return lr * (images / reference) ** {"sqrt": 0.5, "linear": 1.0}[rule]


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Factors on the learning rates of a timm model's parameters: `decay` to the power of the layers above (BEiT,
    arXiv:2106.08254). The model's own group_matcher defines its layers.
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
        multipliers: {regular expression: factor on the learning rate}; the first one that matches a name counts.
        scales: {name of a parameter: further factor on its learning rate}, see layer_scales.
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
    min_lr: float = 0.0,
) -> Scheduler:
    """A schedule in optimizer steps, without state: call scheduler.step_update(finished steps) before each step.

    Args:
        optimizer: the "lr_scale" of its groups multiplies their rates.
        total_steps: length of the run.
        warmup_steps: linear from 0 (excluded) to the base rate; part of total_steps.
        kind: "cosine" down to min_lr, or "step": multiplied by 0.1 at each of decay_steps.
    """
    warmup_steps = min(warmup_steps, total_steps)
    base = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    # The first step has a rate above 0, which would waste it.
    warmup = {"warmup_t": warmup_steps, "warmup_lr_init": base / (warmup_steps + 1), "warmup_prefix": False}
    if kind == "cosine":
        # timm warns that a schedule of one step has no effect. A schedule of two starts with the same learning rate.
        length = max(total_steps, 2)
        return CosineLRScheduler(optimizer, t_initial=length, lr_min=min_lr, t_in_epochs=False, **warmup)
    # timm applies a milestone one step early.
    milestones = [step + 1 for step in sorted(decay_steps)]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, t_in_epochs=False, **warmup)


def make_optimizer(groups: list[dict[str, Any]], name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """timm's optimizer `name`; "adamw" is torch's fused one: few launches for hundreds of small tensors.

    Raises:
        ConfigError: timm has no such optimizer.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    try:
        return create_optimizer_v2(groups, name, lr, weight_decay)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train.optimizer: timm cannot make {name!r}: {error}") from error


def can_skip_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether step_unless can skip a step without waiting for the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    return device.type == "cuda" and bool(optimizer.defaults.get("fused")) and not sharded


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """optimizer.step(), which keeps weights and state if `skip`, a scalar on the device, is 1.

    torch.amp.GradScaler sets `found_inf` for fused optimizers: it is the only way to skip without synchronising.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """timm's moving average of the weights, None at decay 0; its decay is warmed up, so that it serves short runs too.

    Call ema.update(model, step=finished steps) after each step.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True) if decay > 0 else None


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Clips the total norm of the gradients to `limit` (0: not at all) and returns it, on the device, before clipping.

    Neither waits for the device nor checks whether the norm is finite.
    """
    norm = _whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if limit > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def check_gradients(model: nn.Module, where: str) -> None:
    """Raises NonFiniteError, naming the first gradient that holds NaN or infinity."""
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    check_finite(((f"the gradient of {name}", _whole(grad)) for name, grad in named if grad is not None), where)


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor, where each process may hold a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def amp_context(device: torch.device, amp: str, cache: bool = True) -> torch.autocast:
    """Autocast to bfloat16 if amp is "bf16", disabled if it is "none". bfloat16 needs no loss scaler."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16", cache_enabled=cache)
