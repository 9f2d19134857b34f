"""timm models from a configuration, and the weights they start from."""

import difflib
import sys
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from dat.engine.checkpoint import load_weights, read_weights
from dat.utils.errors import CheckpointError, ConfigError, one_line

# Arguments of timm.create_model that load weights.
_SOURCES = ("pretrained", "checkpoint_path")


def create_timm_model(arguments: dict[str, Any], key: str = "model.backbone", **fixed: Any) -> nn.Module:
    """timm.create_model(**arguments, **fixed) with errors that name the configuration's key.

    Args:
        arguments: {"name": any timm model} and arguments of that model, as in the configuration.
        key: key of `arguments` in the configuration.
        fixed: arguments that the caller sets, such as num_classes or features_only.
    Raises:
        ConfigError: no such model, or arguments that it does not take.
    """
    rest = dict(arguments)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{key}.name is {name!r}, should be the name of a timm model, such as 'dat_tiny'")
    clash = sorted(set(rest) & set(fixed))
    if clash:
        raise ConfigError(f"{key}.{clash[0]} is set by this command, should be left out")
    plain = name.split(".")[0]
    if ":" not in name and not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=1)
        raise ConfigError(f"{key}.name: no timm model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for argument, value in rest.items():
        # timm draws with such a probability only when it trains.
        if argument.endswith("_rate") and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ConfigError(f"{key}.{argument} is {value}, should be 0 to 1")
    if rest.get("pretrained") and not {"pretrained_cfg", "pretrained_cfg_overlay"} & rest.keys():
        _check_pretrained(name, key)
    try:
        return timm.create_model(name, **rest, **fixed)
    # Models of any author raise whatever their arguments lead to.
    except (
        TypeError, ValueError, AssertionError, RuntimeError, OSError, LookupError, ArithmeticError, AttributeError,
    ) as error:  # fmt: skip
        if place := _place_of_weights(name) if rest.get("pretrained") and isinstance(error, OSError) else "":
            remedy = f"fetch {place} and set {key}.checkpoint_path to the file, without pretrained"
            raise ConfigError(f"{key}: the weights of {name!r} cannot be downloaded; {remedy}") from error
        raise ConfigError(f"{key}: timm cannot make {name!r} with {rest}: {one_line(error)}") from error


def _place_of_weights(name: str) -> str:
    """Where timm would download the weights of a model from; "" if it has no address."""
    found = timm.get_pretrained_cfg(name) if ":" not in name else None
    if found is not None and found.hf_hub_id:
        return f"https://huggingface.co/{found.hf_hub_id}/resolve/main/model.safetensors"
    return str(found.url or "") if found is not None else ""


def _check_pretrained(name: str, key: str) -> None:
    """Raises ConfigError if timm has no weights of this model, unless it is one of the hub or of a folder."""
    if ":" in name or timm.models.is_model_pretrained(name):
        return
    known = timm.list_pretrained(f"{name.split('.')[0]}.*") or timm.list_pretrained(f"{name.split('_')[0]}*")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    remedy = f"there are some of {', '.join(near)}" if near else f"set {key}.checkpoint_path to a file of weights"
    raise ConfigError(f"{key}.pretrained is true, but timm has no weights of {name!r}; {remedy}")


def starts_from_weights(model: Any) -> bool:
    """Whether the section `model` of a configuration names weights for the backbone."""
    return bool(getattr(model, "checkpoint_path", None)) or any(model.backbone.get(source) for source in _SOURCES)


def without_weights(backbone: dict[str, Any]) -> dict[str, Any]:
    """`model.backbone` without the arguments that load weights, for a model whose checkpoint is loaded afterwards."""
    return {name: value for name, value in backbone.items() if name not in _SOURCES}


def classifier_weights(arguments: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """State of the timm model `arguments` without a head, loaded from a classifier's checkpoint at `path`.

    timm loads weights into a feature extractor without checking them: those of another model would pass silently.
    Raises ConfigError and CheckpointError as load_classifier_weights does.
    """
    body = {name: value for name, value in without_weights(arguments).items() if name != "out_indices"}
    model = create_timm_model(body, num_classes=0)
    load_classifier_weights(model, path)
    return model.state_dict()


def load_classifier_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a classifier's checkpoint (of this project, timm, or an official one), averaged weights if there are any.

    All layers except the last must fit. The last layer keeps its new weights if the checkpoint has another number of
    classes.

    Args:
        model: a timm model.
        path: .pth or .safetensors file, `model.backbone.checkpoint_path` of the configuration.
    Raises:
        ConfigError: no such file.
        CheckpointError: not a checkpoint, or of another model; names the first tensor that differs.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"model.backbone.checkpoint_path: no such file: {path}")
    state = read_weights(path)
    if any(name.startswith("backbone.") for name in state):
        raise CheckpointError(f"{path}: is of a detector; model.backbone.checkpoint_path should be of a classifier")
    # Resizes weights that depend on the image size, such as position tables.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        state = adapt(state, model)
    pretrained_cfg: Any = model.pretrained_cfg
    found = pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((found,) if isinstance(found, str) else found))
    own = model.state_dict()
    head = {name for name in own.keys() | state.keys() if name.startswith(prefixes)}
    if any(name not in own or name not in state or own[name].shape != state[name].shape for name in head):
        state = {name: value for name, value in state.items() if name not in head}
        state |= {name: own[name] for name in head if name in own}
    load_weights(model, state, path)
