"""Checkpoints of the official implementations under this project's names."""

import re

import torch
from torch import Tensor, nn

# Applied in this order.
_RENAMES = (
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.", ""),
    # With box refinement the official decoder holds the heads too.
    (r"^decoder\.(bbox|class)_embed\.", r"\1_embed."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
)


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames tensors of fundamentalvision/Deformable-DETR; their values are not changed.

    Args:
        state_dict: the "model" entry of an official checkpoint, or any part of it, or gradients under the same names.
        model: the DeformableDETR that is to load them. A ResNet backbone of timm has the official names.

    Returns:
        the tensors under `model`'s names, for `model.load_state_dict`.

    Raises:
        ValueError: when the tensors have different heads per decoder layer and `model` one for all.
    """
    converted: dict[str, Tensor] = {}
    for official_name, tensor in state_dict.items():
        name = official_name
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        # The layers of the official MLP have no activations between them.
        name = re.sub(r"^(bbox_embed\.\d+)\.layers\.(\d+)", lambda m: f"{m[1]}.{2 * int(m[2])}", name)
        if not model.box_refine:
            # One head for all layers, listed once for each of them.
            name = re.sub(r"^(bbox|class)_embed\.\d+", r"\1_embed.0", name)
        if name in converted and not torch.equal(converted[name], tensor):
            raise ValueError(
                f"{official_name} differs from the other layers' heads: it needs a model with box_refine=True"
            )
        converted[name] = tensor
    return converted
