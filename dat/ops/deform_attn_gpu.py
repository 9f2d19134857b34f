"""Triton kernels of `deform_attn`: flash attention that looks its position bias up in the table, pair by pair."""

# Triton finds out the types of its kernels' arguments when they are called.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dat.ops.reference import grid_coordinates

# Queries and keys that a program works on at a time.
BLOCK_M, BLOCK_N = 64, 64
# Programs that keep a large GPU busy.
PROGRAMS = 512


@triton.jit
def _pixel(grid, position, cells):
    """grid_sample's own steps; no key beyond 64 meets the table, and NaN goes there too."""
    position = tl.minimum(tl.where(position > -64.0, position, -64.0), 64.0)
    return ((grid[:, None] - position[None, :]) * 0.5 + 1.0) * 0.5 * (cells - 1)


@triton.jit
def _corner(table, row, column, T_h, T_w, inside):
    """A table cell of every pair, where it lies and whether it lies in the table."""
    inside = inside & (row >= 0) & (row < T_h) & (column >= 0) & (column < T_w)
    cell = row * T_w + column
    return tl.load(table + cell, mask=inside, other=0.0).to(tl.float32), cell, inside


@triton.jit
def _look_up(table, grid_x, grid_y, x, y, queries, T_h, T_w, W, HW, pairs):
    """The four table values of every pair [M, N], with the cell above on the left and the fractions beyond it."""
    inside = queries < HW
    pixel_x = _pixel(tl.load(grid_x + queries % W, mask=inside, other=0.0), x, T_w)
    pixel_y = _pixel(tl.load(grid_y + queries // W, mask=inside, other=0.0), y, T_h)
    column, row = tl.floor(pixel_x).to(tl.int32), tl.floor(pixel_y).to(tl.int32)
    a, _, _ = _corner(table, row, column, T_h, T_w, pairs)
    b, _, _ = _corner(table, row, column + 1, T_h, T_w, pairs)
    c, _, _ = _corner(table, row + 1, column, T_h, T_w, pairs)
    d, _, _ = _corner(table, row + 1, column + 1, T_h, T_w, pairs)
    return a, b, c, d, column, row, pixel_x - tl.floor(pixel_x), pixel_y - tl.floor(pixel_y)


@triton.jit
def _rows(start, index, channels, C, inside):
    return tl.load(
        start + index[:, None] * C + channels[None, :], mask=inside[:, None] & (channels[None, :] < C), other=0.0
    )


@triton.jit
def _scores(q, k, scale, bias, inside, PRECISION: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def _interpolate(a, b, c, d, fx, fy):
    top, bottom = a + fx * (b - a), c + fx * (d - c)
    return top + fy * (bottom - top)


@triton.jit
def _forward_kernel(
    query, key, value, positions, table, grid_x, grid_y, out, lse, scale,
    h, group_heads, W, HW, N, C, T_h, T_w,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    group = head // group_heads
    queries, channels = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    table += (head % h) * T_h * T_w
    q = _rows(query + head * HW * C, queries, channels, C, queries < HW)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for start in range(0, N, K):
        keys = start + tl.arange(0, K)
        k = _rows(key + head * N * C, keys, channels, C, keys < N)
        v = _rows(value + head * N * C, keys, channels, C, keys < N)
        pairs = (queries[:, None] < HW) & (keys[None, :] < N)
        bias = tl.zeros([M, K], tl.float32)
        if BIASED:
            x = tl.load(positions + (group * N + keys) * 2, mask=keys < N, other=0.0)
            y = tl.load(positions + (group * N + keys) * 2 + 1, mask=keys < N, other=0.0)
            a, b, c, d, _, _, fx, fy = _look_up(table, grid_x, grid_y, x, y, queries, T_h, T_w, W, HW, pairs)
            bias = _interpolate(a, b, c, d, fx, fy)
        scores = _scores(q, k, scale, bias, keys[None, :] < N, PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    at = out + head * HW * C + queries[:, None] * C + channels[None, :]
    tl.store(at, sums / total[:, None], mask=(queries[:, None] < HW) & (channels[None, :] < C))
    tl.store(lse + head * HW + queries, top + tl.log(total), mask=queries < HW)


@triton.jit
def _query_kernel(
    grad, query, key, value, positions, table, grid_x, grid_y, lse, dots, by_query, scale,
    h, group_heads, W, HW, N, C, T_h, T_w,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, which meets all keys."""
    head = tl.program_id(1).to(tl.int64)
    group = head // group_heads
    queries, channels = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    table += (head % h) * T_h * T_w
    q = _rows(query + head * HW * C, queries, channels, C, queries < HW)
    g = _rows(grad + head * HW * C, queries, channels, C, queries < HW)
    log_total = tl.load(lse + head * HW + queries, mask=queries < HW, other=0.0)
    dot = tl.load(dots + head * HW + queries, mask=queries < HW, other=0.0)
    sums = tl.zeros([M, D], tl.float32)
    for start in range(0, N, K):
        keys = start + tl.arange(0, K)
        k = _rows(key + head * N * C, keys, channels, C, keys < N)
        v = _rows(value + head * N * C, keys, channels, C, keys < N)
        pairs = (queries[:, None] < HW) & (keys[None, :] < N)
        bias = tl.zeros([M, K], tl.float32)
        if BIASED:
            x = tl.load(positions + (group * N + keys) * 2, mask=keys < N, other=0.0)
            y = tl.load(positions + (group * N + keys) * 2 + 1, mask=keys < N, other=0.0)
            a, b, c, d, _, _, fx, fy = _look_up(table, grid_x, grid_y, x, y, queries, T_h, T_w, W, HW, pairs)
            bias = _interpolate(a, b, c, d, fx, fy)
        p = tl.exp(_scores(q, k, scale, bias, pairs, PRECISION) - log_total[:, None])
        by_scores = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - dot[:, None])
        sums += tl.dot(by_scores.to(k.dtype), k, input_precision=PRECISION)
    at = by_query + head * HW * C + queries[:, None] * C + channels[None, :]
    tl.store(at, sums * scale, mask=(queries[:, None] < HW) & (channels[None, :] < C))


@triton.jit
def _add_corner(by_table, table, row, column, T_h, T_w, pairs, update, unit, FIXED: tl.constexpr):
    _, cell, inside = _corner(table, row, column, T_h, T_w, pairs)
    if FIXED:
        # Sums of integers do not depend on their order.
        tl.atomic_add(by_table + cell, tl.floor(update.to(tl.float64) * unit + 0.5).to(tl.int64), mask=inside)
    else:
        tl.atomic_add(by_table + cell, update, mask=inside)


@triton.jit
def _key_kernel(
    grad, query, key, value, positions, table, grid_x, grid_y, lse, dots, by_key, by_value, by_positions, by_table,
    unit, scale, heads, h, group_heads, W, HW, N, C, T_h, T_w, part,
    BIASED: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys, which meets `part` queries; sums of parts are kept apart."""
    head, index = tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = head // group_heads
    keys, channels = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, D)
    table += (head % h) * T_h * T_w
    by_table += (head % h) * T_h * T_w
    k = _rows(key + head * N * C, keys, channels, C, keys < N)
    v = _rows(value + head * N * C, keys, channels, C, keys < N)
    x = tl.load(positions + (group * N + keys) * 2, mask=keys < N, other=0.0)
    y = tl.load(positions + (group * N + keys) * 2 + 1, mask=keys < N, other=0.0)
    key_sums, value_sums = tl.zeros([K, D], tl.float32), tl.zeros([K, D], tl.float32)
    x_sums, y_sums = tl.zeros([K], tl.float32), tl.zeros([K], tl.float32)
    scaling = tl.load(unit)
    for start in range(index * part, tl.minimum(index * part + part, HW), M):
        queries = start + tl.arange(0, M)
        q = _rows(query + head * HW * C, queries, channels, C, queries < HW)
        g = _rows(grad + head * HW * C, queries, channels, C, queries < HW)
        log_total = tl.load(lse + head * HW + queries, mask=queries < HW, other=0.0)
        dot = tl.load(dots + head * HW + queries, mask=queries < HW, other=0.0)
        pairs = (queries[:, None] < HW) & (keys[None, :] < N)
        bias = tl.zeros([M, K], tl.float32)
        if BIASED:
            a, b, c, d, column, row, fx, fy = _look_up(table, grid_x, grid_y, x, y, queries, T_h, T_w, W, HW, pairs)
            bias = _interpolate(a, b, c, d, fx, fy)
        p = tl.exp(_scores(q, k, scale, bias, pairs, PRECISION) - log_total[:, None])
        by_scores = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - dot[:, None])
        value_sums += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        key_sums += tl.dot(tl.trans(by_scores.to(q.dtype)), q, input_precision=PRECISION)
        if BIASED:
            x_sums += tl.sum(by_scores * ((b - a) + fy * ((d - c) - (b - a))), 0)
            y_sums += tl.sum(by_scores * ((c - a) + fx * ((d - b) - (c - a))), 0)
            low, high = by_scores * fy, by_scores * (1 - fy)
            _add_corner(by_table, table, row, column, T_h, T_w, pairs, high * (1 - fx), scaling, FIXED)
            _add_corner(by_table, table, row, column + 1, T_h, T_w, pairs, high * fx, scaling, FIXED)
            _add_corner(by_table, table, row + 1, column, T_h, T_w, pairs, low * (1 - fx), scaling, FIXED)
            _add_corner(by_table, table, row + 1, column + 1, T_h, T_w, pairs, low * fx, scaling, FIXED)
    first = (index.to(tl.int64) * heads + head) * N
    at, inside = (first + keys[:, None]) * C + channels[None, :], (keys[:, None] < N) & (channels[None, :] < C)
    tl.store(by_key + at, key_sums * scale, mask=inside)
    tl.store(by_value + at, value_sums, mask=inside)
    if BIASED:
        tl.store(by_positions + (first + keys) * 2, -x_sums * (T_w - 1) / 4, mask=keys < N)
        tl.store(by_positions + (first + keys) * 2 + 1, -y_sums * (T_h - 1) / 4, mask=keys < N)


def _shared(query: Tensor, key: Tensor, positions: Tensor, table: Tensor | None, size: list[int]) -> list[Any]:
    """Sizes as the kernels take them."""
    T_h, T_w = table.shape[1:] if table is not None else (1, 1)
    _, h, HW, c = query.shape
    return [h, h // positions.shape[1], size[1], HW, key.shape[2], c, T_h, T_w]


def _constants(query: Tensor, table: Tensor | None) -> dict[str, Any]:
    return {
        "BIASED": table is not None,
        # Three products of 19-bit numbers are as exact as one of float32.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "M": BLOCK_M,
        "K": BLOCK_N,
        "D": max(16, triton.next_power_of_2(query.shape[3])),
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None,
    size: list[int],
    scale: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, h, H*W, c] and logarithms [B, h, H*W] of the queries' sums of exponentials; nothing may be empty."""
    query, key, value, positions = (t.contiguous() for t in (query, key, value, positions))
    table = None if table is None else table.contiguous()
    out, lse = torch.empty_like(query), positions.new_empty(query.shape[:3])
    grids = [grid_coordinates(length, positions, align_corners) for length in reversed(size)]
    blocks = triton.cdiv(query.shape[2], BLOCK_M), query.shape[0] * query.shape[1]
    sizes = _shared(query, key, positions, table, size)
    tensors = query, key, value, positions, positions if table is None else table, *grids, out, lse
    _forward_kernel[blocks](*tensors, scale, *sizes, **_constants(query, table))
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    size: list[int],
    scale: float,
    align_corners: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by query, key, value, positions and table; the last two are empty without a table."""
    B, h, HW, c = query.shape
    N, g = key.shape[2], positions.shape[1]
    grad, query, key, value, positions = (t.contiguous() for t in (grad, query, key, value, positions))
    table = None if table is None else table.contiguous()
    grids = [grid_coordinates(length, positions, align_corners) for length in reversed(size)]
    sizes, constants = _shared(query, key, positions, table, size), _constants(query, table)
    dots = (grad.float() * out.float()).sum(-1)
    inputs = grad, query, key, value, positions, positions if table is None else table, *grids, lse, dots
    by_query = torch.empty_like(query)
    _query_kernel[triton.cdiv(HW, BLOCK_M), B * h](*inputs, by_query, scale, *sizes, **constants)

    key_blocks, tiles = triton.cdiv(N, BLOCK_N), triton.cdiv(HW, BLOCK_M)
    parts = max(1, min(tiles, PROGRAMS // (key_blocks * B * h)))
    part = triton.cdiv(tiles, parts) * BLOCK_M
    by_key, by_value = (positions.new_empty(parts, B, h, N, c) for _ in range(2))
    by_positions = positions.new_empty(parts, B, g, h // g, N, 2)
    unit = _fixed_point_unit(grad, value)
    by_table = torch.zeros_like(
        table if table is not None else positions[:0], dtype=torch.int64 if deterministic else None
    )
    _key_kernel[key_blocks, B * h, parts](
        *inputs,
        by_key,
        by_value,
        by_positions,
        by_table,
        unit,
        scale,
        B * h,
        *sizes,
        part,
        FIXED=deterministic,
        **constants,
    )
    if deterministic:
        by_table = (by_table / unit).to(positions.dtype)
    gradients = by_query, by_key.sum(0).to(key.dtype), by_value.sum(0).to(value.dtype)
    if table is None:
        return *gradients, positions.new_empty(0), positions.new_empty(0)
    return *gradients, by_positions.sum((0, 3)), by_table


def _fixed_point_unit(grad: Tensor, value: Tensor) -> Tensor:
    """How many integers make 1, as large as no sum of gradients in the table overflows with.

    Attention sums to 1 for each query, so what a query adds is at most twice the largest product of rows.
    """
    largest = grad.float().norm(dim=-1).amax().double() * value.float().norm(dim=-1).amax().double()
    return 2.0**61 / (2 * grad.shape[:3].numel() * largest.clamp(min=1e-30))
