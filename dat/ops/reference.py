"""Readable PyTorch versions of the ops.

They define each op, are the oracle in its tests, and run where no library was built. The backward functions are written
out, so that they can be differentiated themselves.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops.sizes import sym_max

Shapes = Sequence[tuple[int, int]]


def _axis(location: Tensor, size: int, align_corners: bool) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Linear interpolation along one axis of `size` pixels.

    Returns for the two neighbouring pixels (index clamped into the map, whether it lies inside, weight, the weight's
    derivative with respect to the location).
    """
    factor = float(size - 1 if align_corners else size)
    pixel = location * factor - (0.0 if align_corners else 0.5)
    # Everything more than a pixel outside is zero; clamping keeps the cast to integers defined, and NaN becomes -2.
    pixel = torch.where(pixel > -2, pixel, -2.0).clamp(max=size + 1)
    low = pixel.detach().floor()
    fraction = pixel - low
    neighbors = []
    for step, weight, slope in ((0, 1 - fraction, -factor), (1, fraction, factor)):
        index = low.long() + step
        neighbors.append((index.clamp(0, max(size - 1, 0)), (index >= 0) & (index < size), weight, slope))
    return neighbors


class _Corner(NamedTuple):
    """One of the four pixels around every sample of a level; `row` is zero where the pixel lies outside the map."""

    pixel: Tensor  # index [B, Q*P, H], clamped into the map
    inside: Tensor  # [B, Q, H, P, 1]
    row: Tensor  # [B, Q, H, P, D]
    weight: Tensor  # [B, Q, H, P], like its derivatives with respect to the location's x and y
    slope_x: Tensor
    slope_y: Tensor


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


def _inside(corners: list[_Corner], weights: Tensor) -> Tensor:
    """The weights of a level's samples, zero where a sample is outside the map: infinity times zero would be NaN."""
    inside = torch.zeros_like(weights, dtype=torch.bool)
    for corner in corners:
        inside = inside | corner.inside.squeeze(-1)
    return torch.where(inside, weights, 0.0)


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
    for level, corners in enumerate(_corners(wide, shapes, locations, align_corners)):
        out = wide.new_zeros(B, Q, H, P, value.shape[-1])
        for corner in corners:
            out = out + corner.weight.unsqueeze(-1) * corner.row
        if weights is not None:
            out = out * _inside(corners, weights[:, :, :, level].to(out.dtype)).unsqueeze(-1)
        levels.append(out)
    sampled = torch.stack(levels, 3)
    if weights is not None:
        sampled = sampled.sum((3, 4))
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
    """Gradients of `deform_sample` with respect to value, locations and weights (an empty tensor without weights)."""
    wide, grad = value.to(locations.dtype), grad.to(locations.dtype)
    sample_grad = grad if weights is None else grad[:, :, :, None, None].expand(*locations.shape[:-1], -1)
    grad_value = torch.zeros_like(wide)
    location_levels, weight_levels = [], []
    for level, corners in enumerate(_corners(wide, shapes, locations, align_corners)):
        grad_x = grad_y = grad_weight = torch.zeros_like(locations[:, :, :, level, :, 0])
        of_sample = of_scaled = sample_grad[:, :, :, level]
        if weights is not None:
            of_scaled = of_sample * _inside(corners, weights[:, :, :, level].to(grad.dtype)).unsqueeze(-1)
        for corner in corners:
            dot = (corner.row * of_scaled).sum(-1)
            grad_x = grad_x + corner.slope_x * dot
            grad_y = grad_y + corner.slope_y * dot
            grad_weight = grad_weight + corner.weight * (corner.row * of_sample).sum(-1)
            update = torch.where(corner.inside, corner.weight.unsqueeze(-1) * of_scaled, 0.0)
            update = update.transpose(2, 3).flatten(1, 2)
            grad_value = grad_value.scatter_add(1, corner.pixel.unsqueeze(-1).expand_as(update), update)
        location_levels.append(torch.stack((grad_x, grad_y), -1))
        weight_levels.append(grad_weight)
    grad_weights = torch.stack(weight_levels, 3) if weights is not None else grad.new_empty(0)
    return grad_value.to(value.dtype), torch.stack(location_levels, 3), grad_weights


def ms_deform_attn(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """See `dat.ops.ms_deform_attn`."""
    return deform_sample(value, shapes, *sampling_points(shapes, reference, offsets, logits))


def ms_deform_attn_backward(
    grad: Tensor, value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ms_deform_attn` with respect to value, reference, offsets and logits."""
    locations, weights = sampling_points(shapes, reference, offsets, logits)
    grad_value, grad_locations, grad_weights = deform_sample_backward(grad, value, shapes, locations, weights)
    scaled = weights * grad_weights
    grad_logits = scaled - weights * scaled.sum((3, 4), keepdim=True)
    grad_reference = grad_locations.sum((2, 4))
    if reference.shape[-1] == 4:
        num_points = max(offsets.shape[-2], 1)
        grad_size = (grad_locations * _finite(offsets.to(locations.dtype))).sum((2, 4)) * (0.5 / num_points)
        grad_reference = torch.cat((grad_reference, grad_size), -1)
    grad_offsets = grad_locations * _finite(_offset_unit(shapes, reference.to(locations.dtype), offsets.shape[-2]))
    return grad_value, grad_reference.to(reference.dtype), grad_offsets.to(offsets.dtype), grad_logits.to(logits.dtype)


def _finite(factor: Tensor) -> Tensor:
    """A factor of a gradient, zero where it is not finite: infinity times a gradient of zero would be NaN."""
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
    """Change of the location for an offset of 1: [L, 1, 2] for points, [B, Q, 1, L, 1, 2] for boxes."""
    if reference.shape[-1] == 4:
        return reference[:, :, None, :, None, 2:] * (0.5 / max(num_points, 1))
    # Filled on the device: copying a tensor of Python numbers to it would synchronise.
    sizes = [torch.full((), size, dtype=reference.dtype, device=reference.device) for h, w in shapes for size in (w, h)]
    # An empty level is never sampled, whatever its unit.
    return torch.stack(sizes).clamp(min=1).reciprocal().view(-1, 1, 2)


def position_bias(table: Tensor, positions: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """DAT's continuous relative position bias (equation 5): [B, h, H*W, N], interpolated in `table` [h, T_h, T_w]."""
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
    """Gradients of `position_bias` with respect to positions and table."""
    (H, W), (heads, T_h, T_w), groups = size, table.shape, positions.shape[1]
    grad = grad.unflatten(2, (H, W)).unflatten(1, (groups, -1))
    grad_x = grad_y = positions.new_zeros(1)
    grad_table = table.new_zeros(heads, T_h * T_w)
    for corner in _table_corners(table, positions, size, align_corners):
        grad_x = grad_x + (grad * corner.slope_x * corner.row).sum((2, 3, 4))
        grad_y = grad_y + (grad * corner.slope_y * corner.row).sum((2, 3, 4))
        update = torch.where(corner.inside, grad * corner.weight, 0.0).flatten(1, 2).transpose(0, 1).flatten(1)
        index = corner.pixel.expand(-1, -1, heads // groups, -1, -1, -1).flatten(1, 2).transpose(0, 1).flatten(1)
        grad_table = grad_table.scatter_add(1, index, update)
    # The location, 0..1 across the table, is minus a quarter of the position plus a constant.
    return torch.stack((grad_x, grad_y), -1) / -4, grad_table.view_as(table)


def _table_corners(table: Tensor, positions: Tensor, size: tuple[int, int], align_corners: bool) -> Iterator[_Corner]:
    """The four table entries around each pair's displacement, with tensors [B, g, h/g or 1, H, W, N]."""
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
            index, inside = i * T_w + j, row_inside & column_inside
            row = torch.where(inside, tables[heads, index], 0.0)
            yield _Corner(index, inside, row, wy * wx, wy * dx, dy * wx)


def grid_coordinates(length: int, like: Tensor, align_corners: bool) -> Tensor:
    """Coordinates -1..1 of `length` queries."""
    index = torch.arange(length, dtype=like.dtype, device=like.device)
    # The 2023 release spans -1..1 from the first to the last pixel; a single pixel is at -1.
    return index / sym_max(length - 1, 1) * 2 - 1 if align_corners else (index + 0.5) / length * 2 - 1


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
    """Each query's log-sum-exp of its scores [B, h, H*W], from which the backward pass recomputes the attention."""
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
    """Gradients of `deform_attn` with respect to query, key, value, positions and table.

    Without a table those by positions and table are empty tensors.
    """
    attention = _scores(query, key, positions, table, size, scale, align_corners).softmax(-1)
    grad = grad.to(attention.dtype)
    grad_attention = grad @ value.to(attention.dtype).transpose(-1, -2)
    grad_scores = attention * (grad_attention - (attention * grad_attention).sum(-1, keepdim=True))
    grad_query = grad_scores @ key.to(attention.dtype) * scale
    grad_key = grad_scores.transpose(-1, -2) @ query.to(attention.dtype) * scale
    grad_value = attention.transpose(-1, -2) @ grad
    if table is None:
        # Two tensors: outputs of an op must not alias.
        grad_positions, grad_table = positions.new_empty(0), positions.new_empty(0)
    else:
        grad_positions, grad_table = _position_bias_backward(grad_scores, table, positions, size, align_corners)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_positions, grad_table


def _scores(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    table: Tensor | None,
    size: tuple[int, int],
    scale: float,
    align_corners: bool,
) -> Tensor:
    """Scores [B, h, H*W, N], bias included, in the dtype of the positions."""
    scores = query.to(positions.dtype) @ key.to(positions.dtype).transpose(-1, -2) * scale
    return scores if table is None else scores + position_bias(table, positions, size, align_corners)


def _axis_neighbors(length: int, kernel_size: int, dilation: int, device: torch.device) -> Tensor:
    """Neighbours [length, kernel_size] of each pixel along a side of at least kernel_size * dilation pixels."""
    pixel = torch.arange(length, device=device)
    group, place = pixel % dilation, pixel // dilation
    # Pixels with the same remainder form a map of their own, in which windows move inwards at the borders.
    members = (length - group + dilation - 1) // dilation
    start = torch.minimum((place - kernel_size // 2).clamp(min=0), members - kernel_size)
    return group[:, None] + (start[:, None] + torch.arange(kernel_size, device=device)) * dilation


def neighbors(size: tuple[int, int], kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The neighbours of each pixel and the entries of a head's bias for them: both [H*W, kernel_size**2].

    Pixels are counted row by row, as are the (2 * kernel_size - 1)**2 displacements of the bias.
    """
    side = 2 * kernel_size - 1
    rows, columns = (_axis_neighbors(length, kernel_size, dilation, device) for length in size)
    dy, dx = ((axis - torch.arange(len(axis), device=device)[:, None]) // dilation for axis in (rows, columns))
    pixel = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    displacement = (dy[:, None, :, None] + kernel_size - 1) * side + dx[None, :, None, :] + kernel_size - 1
    return pixel.flatten(2).flatten(0, 1), displacement.flatten(2).flatten(0, 1)


class _Neighborhood(NamedTuple):
    """Intermediate tensors of `neighborhood_attn`, in the dtype of its sums."""

    query: Tensor  # [B, h, H*W, 1, c]
    key: Tensor  # [B, h, H*W, k*k, c]
    value: Tensor
    attention: Tensor  # [B, h, H*W, k*k]
    pixel: Tensor  # [H*W, k*k]
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
    pixel, displacement = neighbors(size, kernel_size, dilation, query.device)
    query = query.to(dtype).unsqueeze(3)
    key, value = key.to(dtype)[:, :, pixel], value.to(dtype)[:, :, pixel]
    scores = (query * key).sum(-1) * scale
    if bias is not None:
        scores = scores + bias.to(dtype).flatten(1)[:, displacement]
    return _Neighborhood(query, key, value, scores.softmax(-1), pixel, displacement)


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
    """See `dat.ops.neighborhood_attn`, for maps of at least kernel_size * dilation pixels along each side."""
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
    """Gradients of `neighborhood_attn` with respect to query, key, value and bias (an empty tensor without a bias)."""
    near = _neighborhood(query, key, value, bias, size, kernel_size, scale, dilation)
    wide = grad.to(near.query.dtype).unsqueeze(3)
    grad_attention = (wide * near.value).sum(-1)
    grad_scores = near.attention * (grad_attention - (near.attention * grad_attention).sum(-1, keepdim=True))

    def scatter(pairs: Tensor) -> Tensor:
        pixels = pairs.new_zeros(*pairs.shape[:3], pairs.shape[-1])
        return pixels.index_add(2, near.pixel.flatten(), pairs.flatten(2, 3))

    scaled = (grad_scores * scale).unsqueeze(-1)
    grad_query = (scaled * near.key).sum(3)
    grad_key = scatter(scaled * near.query)
    grad_value = scatter(near.attention.unsqueeze(-1) * wide)
    grad_bias = wide.new_empty(0)
    if bias is not None:
        displacements = wide.new_zeros(bias.flatten(1).shape)
        grad_bias = displacements.index_add(1, near.displacement.flatten(), grad_scores.sum(0).flatten(1)).view_as(bias)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias
