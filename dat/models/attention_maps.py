"""Attention maps of the D blocks of a DAT: positions of the keys, and how much a query attends to each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat.layers import DeformableAttention
from dat.models.dat import DAT


@dataclass(frozen=True)
class BlockAttention:
    """Queries, keys and attention of a D block for one image.

    Attributes:
        stage, block: the block is model.stages[stage].blocks[block], both from 0.
        layer: its attention layer.
        query: [H, W, C], the projected queries.
        key: [N, C], the projected keys.
        stride: pixels of the model's input per pixel of the query map, along each side.
    """

    stage: int
    block: int
    layer: DeformableAttention
    query: Tensor
    key: Tensor
    stride: int

    @property
    def name(self) -> str:
        return f"stages.{self.stage}.blocks.{self.block}"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the query map."""
        return self.query.shape[0], self.query.shape[1]

    @torch.no_grad()
    def positions(self) -> Tensor:
        """Positions of the keys: [num_groups, N, 2], (x, y), -1 and 1 at the centres of the map's corner pixels."""
        return self.layer.positions(self.query[None])[0]

    @torch.no_grad()
    def reference(self) -> Tensor:
        """Positions of the keys if all offsets were zero, as in `positions`."""
        if self.layer.no_off:
            return self.positions()
        handle = self.layer.offset_proj.register_forward_hook(lambda module, args, offset: torch.zeros_like(offset))
        try:
            return self.positions()
        finally:
            handle.remove()

    @torch.no_grad()
    def attention(self, row: int, column: int) -> Tensor:
        """Attention of a query to each key: [num_heads, N], rows sum to 1, in at least float32."""
        heads, positions = self.layer.num_heads, self.positions()
        query, key = self.query[row, column].to(positions.dtype), self.key.to(positions.dtype)
        products = query.unflatten(-1, (heads, 1, -1)) * key.unflatten(-1, (heads, -1)).transpose(0, 1)
        scores = products.sum(-1) * self.layer.scale
        return (scores + self._bias(row, column, positions)).softmax(-1)

    def _bias(self, row: int, column: int, positions: Tensor) -> Tensor:
        """Position bias of one query: [num_heads, N], or zero."""
        layer, (H, W) = self.layer, self.size
        if layer.fixed_bias is not None:
            return layer.fixed_bias((H, W), layer.key_size((H, W)))[:, row * W + column]
        point = torch.stack((layer.query_grid(W, positions)[column], layer.query_grid(H, positions)[row]))
        if layer.log_cpb is not None:
            return layer.log_cpb(point[None], positions[None])[0, :, 0]
        if layer.rpe_table is None:
            return positions.new_zeros(())
        tables = layer.rpe_table.to(positions.dtype).unflatten(0, (layer.num_groups, -1))
        displacement = ((point - positions) / 2).unsqueeze(1)
        return F.grid_sample(tables, displacement, align_corners=True)[:, :, 0].flatten(0, 1)

    def query_at(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the query at pixel (x, y) of the model's input; 0 is the centre of the first pixel."""
        row, column = (
            min(max(int((pixel + 0.5) // self.stride), 0), length - 1)
            for pixel, length in zip((y, x), self.size, strict=True)
        )
        return row, column

    def pixels(self, positions: Tensor) -> Tensor:
        """Positions [..., 2] as pixels (x, y) of the model's input, stride x stride for each pixel of the map."""
        last = positions.new_tensor(self.size[::-1]) - 1
        return ((positions + 1) / 2 * last + 0.5) * self.stride - 0.5


def deformable_blocks(model: DAT) -> dict[tuple[int, int], DeformableAttention]:
    """The attention layers of a model's D blocks by (stage, block), both from 0."""
    layers = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.get_submodule("blocks").children()):
            attention = getattr(block, "attn", None)
            if isinstance(attention, DeformableAttention):
                layers[i, j] = attention
    return layers


@torch.no_grad()
def capture_attention(
    model: DAT, image: Tensor, blocks: Sequence[tuple[int, int]] | None = None
) -> tuple[list[BlockAttention], Tensor]:
    """Run a model on one image and keep the attention of its D blocks.

    Args:
        model: in evaluation mode.
        image: [in_chans, H, W], normalised as the model takes it.
        blocks: (stage, block) of the D blocks to keep; None: all.

    Returns:
        The attention in the order of `blocks`, and the model's output [num_classes].

    Raises:
        ValueError: one of `blocks` is not a D block; the message lists the D blocks.
    """
    layers = deformable_blocks(model)
    chosen = list(layers) if blocks is None else list(blocks)
    for key in chosen:
        if key not in layers:
            raise ValueError(f"blocks must be (stage, block) of D blocks, {list(layers)}, got {key}")
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[module] = output[0]

    handles = [module.register_forward_hook(keep) for key in chosen for module in (layers[key].q, layers[key].k)]
    try:
        logits = model(image[None])[0]
    finally:
        for handle in handles:
            handle.remove()
    captured = []
    for stage, block in chosen:
        layer, stride = layers[stage, block], model.feature_info[stage]["reduction"]
        captured.append(BlockAttention(stage, block, layer, outputs[layer.q], outputs[layer.k], stride))
    return captured, logits
