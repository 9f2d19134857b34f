"""Readable PyTorch versions of the ops.

They say what each op means, are the oracle of its tests and the fallback where no library was built.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]


def _axis(location: Tensor, size: int, align_corners: bool) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Linear interpolation along one axis of `size` cells.

    Returns for the two neighbouring cells (index clamped into the map, whether it lies inside, weight, the weight's
    derivative by the location).
    """
    factor = float(size - 1 if align_corners else size)
    pixel = location * factor - (0.0 if align_corners else 0.5)
    # Beyond one cell outside all is zero, and clamping keeps the cast to integers defined; NaN goes the same way.
    pixel = torch.where(pixel > -2, pixel, -2.0).clamp(max=size + 1)
    low = pixel.detach().floor()
    fraction = pixel - low
    taps = []
    for step, weight, slope in ((0, 1 - fraction, -factor), (1, fraction, factor)):
        index = low.long() + step
        taps.append((index.clamp(0, max(size - 1, 0)), (index >= 0) & (index < size), weight, slope))
    return taps


class _Corner(NamedTuple):
    """One corner cell of every sample of a level; the row of a cell outside the map is zero, whatever `cell` finds."""

    cell: Tensor  # [B, Q*P, H], clamped into the map
    inside: Tensor  # [B, Q, H, P, 1]
    row: Tensor  # [B, Q, H, P, D]
    weight: Tensor  # [B, Q, H, P], as its derivatives by x and y
    by_x: Tensor
    by_y: Tensor


def _corners(value: Tensor, shapes: Shapes, locations: Tensor, align_corners: bool) -> Iterator[list[_Corner]]:
    """The four corners of each level's samples; none where the level or the samples are empty."""
    Q = locations.shape[1]
    start = 0
    for level, (height, width) in enumerate(shapes):
        x, y = locations[:, :, :, level].unbind(-1)
        corners = []
        if height and width and x.numel():
            for i, row_inside, wy, dy in _axis(y, height, align_corners):
                for j, column_inside, wx, dx in _axis(x, width, align_corners):
                    index = (start + i * width + j).transpose(2, 3).flatten(1, 2)
                    inside = (row_inside & column_inside).unsqueeze(-1)
                    row = torch.where(inside, _gather(value, index, Q), 0.0)
                    corners.append(_Corner(index, inside, row, wy * wx, wy * dx, dy * wx))
        yield corners
        start += height * width


def _gather(value: Tensor, index: Tensor, num_queries: int) -> Tensor:
    """Rows `index` [B, Q*P, H] of `value` [B, S, H, D], as [B, Q, H, P, D]."""
    rows = value.gather(1, index.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1]))
    return rows.unflatten(1, (num_queries, -1)).transpose(2, 3)


def deform_sample(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor | None = None, *, align_corners: bool = False
) -> Tensor:
    """See `dat.ops.deform_sample`; differentiable any number of times."""
    B, Q, H, _, P, _ = locations.shape
    wide = value.to(locations.dtype)
    levels = []
    for corners in _corners(wide, shapes, locations, align_corners):
        out = wide.new_zeros(B, Q, H, P, value.shape[-1])
        for corner in corners:
            out = out + corner.weight.unsqueeze(-1) * corner.row
        levels.append(out)
    sampled = torch.stack(levels, 3)
    if weights is not None:
        sampled = (sampled * weights.to(sampled.dtype).unsqueeze(-1)).sum((3, 4))
    return sampled.to(value.dtype)


def deform_sample_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor | None = None,
    *,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `deform_sample` by value, locations and weights (an empty tensor where weights is None).

    They are differentiable themselves.
    """
    wide, grad = value.to(locations.dtype), grad.to(locations.dtype)
    if weights is None:
        scaled = sample_grad = grad
    else:
        sample_grad = grad[:, :, :, None, None].expand(*locations.shape[:-1], -1)
        scaled = sample_grad * weights.to(grad.dtype).unsqueeze(-1)
    grad_value = torch.zeros_like(wide)
    grad_locations, grad_weights = [], []
    for level, corners in enumerate(_corners(wide, shapes, locations, align_corners)):
        by_x = by_y = by_weight = torch.zeros_like(locations[:, :, :, level, :, 0])
        of_sample, of_scaled = sample_grad[:, :, :, level], scaled[:, :, :, level]
        for corner in corners:
            dot = (corner.row * of_scaled).sum(-1)
            by_x = by_x + corner.by_x * dot
            by_y = by_y + corner.by_y * dot
            by_weight = by_weight + corner.weight * (corner.row * of_sample).sum(-1)
            update = torch.where(corner.inside, corner.weight.unsqueeze(-1) * of_scaled, 0.0)
            update = update.transpose(2, 3).flatten(1, 2)
            grad_value = grad_value.scatter_add(1, corner.cell.unsqueeze(-1).expand_as(update), update)
        grad_locations.append(torch.stack((by_x, by_y), -1))
        grad_weights.append(by_weight)
    by_weights = torch.stack(grad_weights, 3) if weights is not None else grad.new_empty(0)
    return grad_value.to(value.dtype), torch.stack(grad_locations, 3), by_weights


def ms_deform_attn(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """See `dat.ops.ms_deform_attn`."""
    return deform_sample(value, shapes, *sampling_points(shapes, reference, offsets, logits))


def ms_deform_attn_backward(
    grad: Tensor, value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ms_deform_attn` by value, reference, offsets and logits; they are differentiable themselves."""
    locations, weights = sampling_points(shapes, reference, offsets, logits)
    by_value, by_locations, by_weights = deform_sample_backward(grad, value, shapes, locations, weights)
    scaled = weights * by_weights
    by_logits = scaled - weights * scaled.sum((3, 4), keepdim=True)
    by_reference = by_locations.sum((2, 4))
    if reference.shape[-1] == 4:
        by_size = (by_locations * _finite(offsets.to(locations.dtype))).sum((2, 4)) * (0.5 / max(offsets.shape[-2], 1))
        by_reference = torch.cat((by_reference, by_size), -1)
    by_offsets = by_locations * _finite(_offset_unit(shapes, reference.to(locations.dtype), offsets.shape[-2]))
    return by_value, by_reference.to(reference.dtype), by_offsets.to(offsets.dtype), by_logits.to(logits.dtype)


def _finite(factor: Tensor) -> Tensor:
    """A factor of gradients that are zero where it is not finite; times 0 that would not be a number."""
    return torch.where(factor.isfinite(), factor, 0.0)


def sampling_points(shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P] of multi-scale deformable attention, at least float32.

    Deformable DETR, equation 3 and appendix A.4: offsets are counted in pixels of their level around a reference point,
    or in half boxes divided by the number of points around a reference box.
    """
    dtype = torch.promote_types(torch.promote_types(reference.dtype, offsets.dtype), torch.float32)
    reference, offsets = reference.to(dtype), offsets.to(dtype)
    center = reference[:, :, None, :, None, :2]
    locations = center + offsets * _offset_unit(shapes, reference, offsets.shape[-2])
    weights = F.softmax(logits.to(dtype).flatten(-2), -1).view_as(logits)
    return locations, weights


def _offset_unit(shapes: Shapes, reference: Tensor, num_points: int) -> Tensor:
    """What an offset of 1 is as a location: [L, 1, 2] for points, [B, Q, 1, L, 1, 2] for boxes."""
    if reference.shape[-1] == 4:
        return reference[:, :, None, :, None, 2:] * (0.5 / max(num_points, 1))
    # Filled on the device: a tensor made of Python numbers would be copied there and waited for.
    sizes = [torch.full((), size, dtype=reference.dtype, device=reference.device) for h, w in shapes for size in (w, h)]
    # An empty level has nothing to sample, wherever that is.
    return torch.stack(sizes).clamp(min=1).reciprocal().view(-1, 1, 2)


def position_bias(table: Tensor, positions: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """DAT's continuous relative position bias (equation 5): [B, h, H*W, N] looked up in `table` [h, T_h, T_w]."""
    H, W = size
    B, groups = positions.shape[:2]
    y, x = grid_coordinates(H, positions, align_corners), grid_coordinates(W, positions, align_corners)
    query = torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).flatten(0, 1)
    displacement = (query[:, None] - positions.flatten(0, 1)[:, None]) * 0.5
    tables = table.unflatten(0, (groups, -1)).expand(B, -1, -1, -1, -1).flatten(0, 1).to(positions.dtype)
    # torch cannot trace cuDNN's sampler, which has no fake kernel.
    with torch.backends.cudnn.flags(enabled=False):
        bias = F.grid_sample(tables, displacement, mode="bilinear", padding_mode="zeros", align_corners=True)
    return bias.unflatten(0, (B, groups)).flatten(1, 2)


def _position_bias_backward(
    grad: Tensor, table: Tensor, positions: Tensor, size: tuple[int, int], align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `position_bias` by positions and table; they are differentiable themselves."""
    (H, W), (heads, T_h, T_w), groups = size, table.shape, positions.shape[1]
    grad = grad.unflatten(2, (H, W)).unflatten(1, (groups, -1))
    by_x = by_y = positions.new_zeros(1)
    by_table = table.new_zeros(heads, T_h * T_w)
    for corner in _table_corners(table, positions, size, align_corners):
        by_x = by_x + (grad * corner.by_x * corner.row).sum((2, 3, 4))
        by_y = by_y + (grad * corner.by_y * corner.row).sum((2, 3, 4))
        update = torch.where(corner.inside, grad * corner.weight, 0.0).flatten(1, 2).transpose(0, 1).flatten(1)
        cell = corner.cell.expand(-1, -1, heads // groups, -1, -1, -1).flatten(1, 2).transpose(0, 1).flatten(1)
        by_table = by_table.scatter_add(1, cell, update)
    # A location, 0..1 across the table, changes by a quarter of the displacement, against the position.
    return torch.stack((by_x, by_y), -1) / -4, by_table.view_as(table)


def _table_corners(table: Tensor, positions: Tensor, size: tuple[int, int], align_corners: bool) -> Iterator[_Corner]:
    """The four table cells around each pair's displacement, [B, g, h/g or 1, H, W, N]; slopes are by its location."""
    H, W = size
    T_h, T_w = table.shape[1:]
    x, y = positions[:, :, None, None, None].unbind(-1)
    # Half the displacement is -1..1 across the table, and `_axis` takes 0..1.
    ys = _axis((((grid_coordinates(H, positions, align_corners)[:, None, None] - y) * 0.5) + 1) * 0.5, T_h, True)
    xs = _axis((((grid_coordinates(W, positions, align_corners)[:, None] - x) * 0.5) + 1) * 0.5, T_w, True)
    tables = table.to(positions.dtype).flatten(1)
    groups = positions.shape[1]
    heads = torch.arange(len(tables), device=table.device).view(groups, -1, 1, 1, 1)
    for i, row_inside, wy, dy in ys:
        for j, column_inside, wx, dx in xs:
            cell, inside = i * T_w + j, row_inside & column_inside
            row = torch.where(inside, tables[heads, cell], 0.0)
            yield _Corner(cell, inside, row, wy * wx, wy * dx, dy * wx)


def grid_coordinates(length: int, like: Tensor, align_corners: bool) -> Tensor:
    """Coordinates -1..1 of `length` queries."""
    index = torch.arange(length, dtype=like.dtype, device=like.device)
    # The 2023 release spans -1..1 from first to last cell; a map of one cell has only its first.
    return index / max(length - 1, 1) * 2 - 1 if align_corners else (index + 0.5) / length * 2 - 1


def deform_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None = None,
    *,
    size: tuple[int, int],
    scale: float,
    align_corners: bool = True,
) -> Tensor:
    """See `dat.ops.deform_attn`."""
    attention = _scores(query, key, positions, table, size, scale, align_corners).softmax(-1)
    return (attention @ value.to(attention.dtype)).to(query.dtype)


def deform_attn_lse(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    table: Tensor | None,
    *,
    size: tuple[int, int],
    scale: float,
    align_corners: bool,
) -> Tensor:
    """The logarithm [B, h, H*W] of every query's sum of exponentials, which backward makes the attention from again."""
    return _scores(query, key, positions, table, size, scale, align_corners).logsumexp(-1)


def deform_attn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None = None,
    *,
    size: tuple[int, int],
    scale: float,
    align_corners: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `deform_attn` by query, key, value, positions and table; they are differentiable themselves.

    Without a table those by positions and table are empty tensors.
    """
    attention = _scores(query, key, positions, table, size, scale, align_corners).softmax(-1)
    grad = grad.to(attention.dtype)
    by_attention = grad @ value.to(attention.dtype).transpose(-1, -2)
    by_scores = attention * (by_attention - (attention * by_attention).sum(-1, keepdim=True))
    by_query = by_scores @ key.to(attention.dtype) * scale
    by_key = by_scores.transpose(-1, -2) @ query.to(attention.dtype) * scale
    by_value = attention.transpose(-1, -2) @ grad
    if table is None:
        # Two tensors: outputs of an op must not alias.
        by_positions, by_table = positions.new_empty(0), positions.new_empty(0)
    else:
        by_positions, by_table = _position_bias_backward(by_scores, table, positions, size, align_corners)
    return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), by_positions, by_table


def _scores(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    table: Tensor | None,
    size: tuple[int, int],
    scale: float,
    align_corners: bool,
) -> Tensor:
    """Scores [B, h, H*W, N] with their bias, in the dtype of the positions."""
    scores = query.to(positions.dtype) @ key.to(positions.dtype).transpose(-1, -2) * scale
    return scores if table is None else scores + position_bias(table, positions, size, align_corners)


def _axis_neighbors(length: int, kernel_size: int, dilation: int, device: torch.device) -> Tensor:
    """Neighbours [length, kernel_size] of each cell along a side of at least kernel_size * dilation cells."""
    cell = torch.arange(length, device=device)
    group, place = cell % dilation, cell // dilation
    # Cells of the same remainder are a map of their own, in which windows are shifted inwards at the borders.
    members = (length - group + dilation - 1) // dilation
    start = torch.minimum((place - kernel_size // 2).clamp(min=0), members - kernel_size)
    return group[:, None] + (start[:, None] + torch.arange(kernel_size, device=device)) * dilation


def neighbors(size: tuple[int, int], kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which cells a cell attends to, and by which entry of its head's bias: both [H*W, kernel_size**2].

    Cells are counted row by row, as are the (2 * kernel_size - 1)**2 displacements of the bias.
    """
    side = 2 * kernel_size - 1
    rows, columns = (_axis_neighbors(length, kernel_size, dilation, device) for length in size)
    dy, dx = ((axis - torch.arange(len(axis), device=device)[:, None]) // dilation for axis in (rows, columns))
    cell = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    displacement = (dy[:, None, :, None] + kernel_size - 1) * side + dx[None, :, None, :] + kernel_size - 1
    return cell.flatten(2).flatten(0, 1), displacement.flatten(2).flatten(0, 1)


class _Neighborhood(NamedTuple):
    """Tensors of `neighborhood_attn` on the way to its result, in the dtype of its sums."""

    query: Tensor  # [B, h, H*W, 1, c]
    key: Tensor  # [B, h, H*W, k*k, c]
    value: Tensor
    attention: Tensor  # [B, h, H*W, k*k]
    cell: Tensor  # [H*W, k*k]
    displacement: Tensor


def _neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    kernel_size: int,
    scale: float,
    dilation: int,
) -> _Neighborhood:
    dtype = torch.promote_types(query.dtype, torch.float32)
    cell, displacement = neighbors(size, kernel_size, dilation, query.device)
    query = query.to(dtype).unsqueeze(3)
    key, value = key.to(dtype)[:, :, cell], value.to(dtype)[:, :, cell]
    scores = (query * key).sum(-1) * scale
    if bias is not None:
        scores = scores + bias.to(dtype).flatten(1)[:, displacement]
    return _Neighborhood(query, key, value, scores.softmax(-1), cell, displacement)


def neighborhood_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int],
    kernel_size: int,
    scale: float,
    dilation: int = 1,
) -> Tensor:
    """See `dat.ops.neighborhood_attn`, for maps of at least kernel_size * dilation cells along each side."""
    near = _neighborhood(query, key, value, bias, size, kernel_size, scale, dilation)
    return (near.attention.unsqueeze(-1) * near.value).sum(3).to(query.dtype)


def neighborhood_attn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    size: tuple[int, int],
    kernel_size: int,
    scale: float,
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `neighborhood_attn` by query, key, value and bias (an empty tensor where bias is None).

    They are differentiable themselves.
    """
    near = _neighborhood(query, key, value, bias, size, kernel_size, scale, dilation)
    wide = grad.to(near.query.dtype).unsqueeze(3)
    by_attention = (wide * near.value).sum(-1)
    by_scores = near.attention * (by_attention - (near.attention * by_attention).sum(-1, keepdim=True))

    def scatter(pairs: Tensor) -> Tensor:
        cells = pairs.new_zeros(*pairs.shape[:3], pairs.shape[-1])
        return cells.index_add(2, near.cell.flatten(), pairs.flatten(2, 3))

    scaled = (by_scores * scale).unsqueeze(-1)
    by_query = (scaled * near.key).sum(3)
    by_key = scatter(scaled * near.query)
    by_value = scatter(near.attention.unsqueeze(-1) * wide)
    by_bias = wide.new_empty(0)
    if bias is not None:
        displacements = wide.new_zeros(bias.flatten(1).shape)
        by_bias = displacements.index_add(1, near.displacement.flatten(), by_scores.sum(0).flatten(1)).view_as(bias)
    return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), by_bias
