"""Triton kernels of `neighborhood_attn` for GPUs; imported with the first call, as triton is not needed elsewhere.

A program takes a tile of 8 x 8 queries (or of keys) and loops over the pixels around it one block at a time: with a
window of 7 x 7 these are 14 x 14 pixels, in seven blocks of 2 x 16. No two programs add to the same number, so that
sums are always taken in the same order.

A product of matrices gives 0 * NaN to queries that are no neighbours of a NaN. Rows of results that are not finite are
therefore taken once more, each from its own window; while all numbers are finite this costs a comparison.
"""

# Kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dat.ops.triton_launch import ceil_div, exp, launch, power_of_2, product_precision

TILE = tl.constexpr(8)
# Values that differ from stage to stage: kernels specialised on them would be compiled again for each.
SIZES = ["heads", "H", "W"]


@triton.jit
def _window_start(index, length, KERNEL: tl.constexpr):
    """The first neighbour of `index` along a side: windows are moved inwards at the borders."""
    return tl.minimum(tl.maximum(index - KERNEL // 2, 0), length - KERNEL)


@triton.jit
def _locate(heads, H, W, DILATION: tl.constexpr):
    """Image and head of this program, first row and column of its dilation group, and of its tile within the group."""
    tiles_y, tiles_x = tl.cdiv(tl.cdiv(H, DILATION), TILE), tl.cdiv(tl.cdiv(W, DILATION), TILE)
    program = tl.program_id(0)
    tile = program % (tiles_y * tiles_x)
    rest = program // (tiles_y * tiles_x)
    group = rest % (DILATION * DILATION)
    head = rest // (DILATION * DILATION)
    row, column = tile // tiles_x * TILE, tile % tiles_x * TILE
    # In 64 bits, as steps from head to head may be large.
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), group // DILATION, group % DILATION, row, column


@triton.jit
def _group_size(H, W, y, x, DILATION: tl.constexpr):
    """Rows and columns of the pixels of a dilation group."""
    return tl.cdiv(H - y, DILATION), tl.cdiv(W - x, DILATION)


@triton.jit
def _grid(row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of ROWS x COLUMNS pixels, one after another."""
    index = tl.arange(0, ROWS * COLUMNS)
    return row + index // COLUMNS, column + index % COLUMNS


@triton.jit
def _pixel(row, column, y, x, W, DILATION: tl.constexpr):
    """Cells of a group, counted in the whole map."""
    return ((y + row * DILATION).to(tl.int64) * W) + x + column * DILATION


@triton.jit
def _load(data, pixel, step, inside, C, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (channel < C)[None, :]
    return tl.load(data + pixel[:, None] * step + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store(data, value, pixel, step, inside, C, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (channel < C)[None, :]
    tl.store(data + pixel[:, None] * step + channel[None, :], value.to(data.dtype.element_ty), mask=mask)


@triton.jit
def _scores(
    q, k, bias, row, column, key_row, key_column, rows, columns, scale,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Scores of queries and keys, minus infinity for those that are no neighbours; pixels outside the map have none."""
    first_row, first_column = _window_start(row, rows, K)[:, None], _window_start(column, columns, K)[:, None]
    dy, dx = key_row[None, :] - first_row, key_column[None, :] - first_column
    near = (dy >= 0) & (dy < K) & (dx >= 0) & (dx < K) & ((row < rows) & (column < columns))[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        place = (key_row[None, :] - row[:, None] + K - 1) * (2 * K - 1) + key_column[None, :] - column[:, None] + K - 1
        scores += tl.load(bias + place, mask=near, other=0.0)
    return tl.where(near, scores, float("-inf"))


@triton.jit
def _finite(top):
    """The largest score so far, or 0 where there was none: minus infinity less itself is not a number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _not_finite(sums):
    """Which rows hold NaN or infinity."""
    return tl.max((sums - sums != 0.0).to(tl.int32), 1) > 0


@triton.jit
def _holds(cells, dy, dx):
    """Whether a cell of the tile is among `cells`."""
    return tl.max((cells & (tl.arange(0, TILE * TILE) == TILE * dy + dx)).to(tl.int32), 0) > 0


@triton.jit
def _load_one(data, pixel, step, C, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    return tl.load(data + pixel * step + channel, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def _store_one(data, value, pixel, step, C, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    tl.store(data + pixel * step + channel, value.to(data.dtype.element_ty), mask=channel < C)


@triton.jit
def _window_row(
    q, key, value, bias, k_pixel, v_pixel, step, row, column, rows, columns, y, x, W, C, scale,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of the window of one query: keys, values [COLUMNS, BLOCK_C] and scores [COLUMNS]."""
    key_row, key_column = _window_start(row, rows, K) + step, _window_start(column, columns, K) + tl.arange(0, COLUMNS)
    near = tl.arange(0, COLUMNS) < K
    pixel = _pixel(key_row, key_column, y, x, W, DILATION)
    k = _load(key, pixel, k_pixel, near, C, BLOCK_C).to(tl.float32)
    v = _load(value, pixel, v_pixel, near, C, BLOCK_C).to(tl.float32)
    scores = tl.sum(q[None, :] * k, 1) * scale
    if HAS_BIAS:
        place = (key_row - row + K - 1) * (2 * K - 1) + key_column - column + K - 1
        scores += tl.load(bias + place, mask=near, other=0.0)
    return k, v, tl.where(near, scores, float("-inf"))


@triton.jit
def _attend_one(
    q, key, value, bias, k_pixel, v_pixel, row, column, rows, columns, y, x, W, C, scale,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Output of one query and the logarithm of the sum of its exponentials."""
    top, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(K):
        _, v, s = _window_row(
            q, key, value, bias, k_pixel, v_pixel, step, row, column, rows, columns, y, x, W, C, scale,
            HAS_BIAS, K, DILATION, BLOCK_C, COLUMNS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 0))
        shrink, p = exp(top, _finite(higher)), exp(s, _finite(higher))
        total = total * shrink + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v, 0)
        top = higher
    return sums / total, _finite(top) + tl.log(total)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query, key, value, bias, out, q_image, q_head, q_pixel, k_image, k_head, k_pixel, v_image, v_head, v_pixel,
    heads, H, W, C, scale,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, head, y, x, first_row, first_column = _locate(heads, H, W, DILATION)
    rows, columns = _group_size(H, W, y, x, DILATION)
    row, column = _grid(first_row, first_column, TILE, TILE)
    inside = (row < rows) & (column < columns)
    pixel = _pixel(row, column, y, x, W, DILATION)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    bias += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    query += image * q_image + head * q_head
    q = _load(query, pixel, q_pixel, inside, C, BLOCK_C)
    top = tl.full((TILE * TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE * TILE,), tl.float32)
    sums = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    begin_row, begin_column = _window_start(first_row, rows, KERNEL), _window_start(first_column, columns, KERNEL)
    for step in range(tl.cdiv(TILE + KERNEL - 1, ROWS)):
        key_row, key_column = _grid(begin_row + step * ROWS, begin_column, ROWS, COLUMNS)
        key_inside = (key_row < rows) & (key_column < columns)
        key_pixel = _pixel(key_row, key_column, y, x, W, DILATION)
        k = _load(key, key_pixel, k_pixel, key_inside, C, BLOCK_C)
        v = _load(value, key_pixel, v_pixel, key_inside, C, BLOCK_C)
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, PRECISION, KERNEL)
        higher = tl.maximum(top, tl.max(s, 1))
        shrink, p = exp(top, _finite(higher)), exp(s, _finite(higher)[:, None])
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    out += image * H * W * heads * C + head * C
    spoiled = inside & _not_finite(sums)
    _store(out, sums / total[:, None], pixel, heads * C, inside & ~spoiled, C, BLOCK_C)
    if tl.max(spoiled.to(tl.int32), 0) > 0:
        for dy in range(TILE):
            for dx in range(TILE):
                if _holds(spoiled, dy, dx):
                    row_one, column_one = first_row + dy, first_column + dx
                    pixel_one = _pixel(row_one, column_one, y, x, W, DILATION)
                    result, _ = _attend_one(
                        _load_one(query, pixel_one, q_pixel, C, BLOCK_C), key, value, bias, k_pixel, v_pixel,
                        row_one, column_one, rows, columns, y, x, W, C, scale,
                        HAS_BIAS, KERNEL, DILATION, BLOCK_C, COLUMNS,
                    )  # fmt: skip
                    _store_one(out, result, pixel_one, heads * C, C, BLOCK_C)


@triton.jit
def _bias_sums(grad_scores, row, column, key_row, key_column, DTYPE: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Sums [SIDE, SIDE] of a block's gradients by displacement.

    They are two products with matrices of zeros and ones, which select the pairs of columns, then of rows, to sum.
    """
    places = tl.arange(0, SIDE)
    tile_row, block_row = tl.min(tl.reshape(row, (TILE, TILE)), 1), tl.min(tl.reshape(key_row, (ROWS, COLUMNS)), 1)
    tile_column = tl.min(tl.reshape(column, (TILE, TILE)), 0)
    block_column = tl.min(tl.reshape(key_column, (ROWS, COLUMNS)), 0)
    dx = tl.reshape(block_column[None, :] - tile_column[:, None] + K - 1, (TILE * COLUMNS,))
    dy = tl.reshape(block_row[None, :] - tile_row[:, None] + K - 1, (TILE * ROWS,))
    column_pairs = tl.permute(tl.reshape(grad_scores.to(DTYPE), (TILE, TILE, ROWS, COLUMNS)), (0, 2, 1, 3))
    column_pairs = tl.reshape(column_pairs, (TILE * ROWS, TILE * COLUMNS))
    row_sums = tl.dot(column_pairs, (dx[:, None] == places[None, :]).to(DTYPE), input_precision="tf32x3")
    return tl.dot((dy[None, :] == places[:, None]).to(tl.float32), row_sums, input_precision="tf32x3")


@triton.jit(do_not_specialize=SIZES)
def _backward_queries(
    grad, query, key, value, bias, grad_query, grad_bias, log_sums, means,
    g_image, g_head, g_pixel, q_image, q_head, q_pixel, k_image, k_head, k_pixel, v_image, v_head, v_pixel,
    heads, H, W, C, scale,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    image, head, y, x, first_row, first_column = _locate(heads, H, W, DILATION)
    rows, columns = _group_size(H, W, y, x, DILATION)
    row, column = _grid(first_row, first_column, TILE, TILE)
    inside = (row < rows) & (column < columns)
    pixel = _pixel(row, column, y, x, W, DILATION)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    bias += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    query += image * q_image + head * q_head
    q = _load(query, pixel, q_pixel, inside, C, BLOCK_C)
    grad += image * g_image + head * g_head
    g = _load(grad, pixel, g_pixel, inside, C, BLOCK_C)
    begin_row, begin_column = _window_start(first_row, rows, KERNEL), _window_start(first_column, columns, KERNEL)
    top = tl.full((TILE * TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE * TILE,), tl.float32)
    mean = tl.zeros((TILE * TILE,), tl.float32)
    for step in range(tl.cdiv(TILE + KERNEL - 1, ROWS)):
        key_row, key_column = _grid(begin_row + step * ROWS, begin_column, ROWS, COLUMNS)
        key_inside = (key_row < rows) & (key_column < columns)
        key_pixel = _pixel(key_row, key_column, y, x, W, DILATION)
        k = _load(key, key_pixel, k_pixel, key_inside, C, BLOCK_C)
        v = _load(value, key_pixel, v_pixel, key_inside, C, BLOCK_C)
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, PRECISION, KERNEL)
        higher = tl.maximum(top, tl.max(s, 1))
        shrink, p = exp(top, _finite(higher)), exp(s, _finite(higher)[:, None])
        total = total * shrink + tl.sum(p, 1)
        mean = mean * shrink + tl.sum(p * tl.dot(g, tl.trans(v), input_precision=PRECISION), 1)
        top = higher
    # Pixels outside the map have no neighbours; their values are set to zero.
    log_sum = tl.where(inside, _finite(top) + tl.log(total), 0.0)
    mean = tl.where(inside, mean / total, 0.0)
    query_sums = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    bias_sums = tl.zeros((SIDE, SIDE), tl.float32)
    for step in range(tl.cdiv(TILE + KERNEL - 1, ROWS)):
        key_row, key_column = _grid(begin_row + step * ROWS, begin_column, ROWS, COLUMNS)
        key_inside = (key_row < rows) & (key_column < columns)
        key_pixel = _pixel(key_row, key_column, y, x, W, DILATION)
        k = _load(key, key_pixel, k_pixel, key_inside, C, BLOCK_C)
        v = _load(value, key_pixel, v_pixel, key_inside, C, BLOCK_C)
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, PRECISION, KERNEL)
        grad_attention = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        grad_scores = exp(s, log_sum[:, None]) * (grad_attention - mean[:, None])
        query_sums += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        if HAS_BIAS:
            bias_sums += _bias_sums(grad_scores, row, column, key_row, key_column, k.dtype, KERNEL, SIDE, ROWS, COLUMNS)
    log_sums += (image * heads + head) * H * W
    means += (image * heads + head) * H * W
    grad_query += image * H * W * heads * C + head * C
    spoiled = inside & _not_finite(query_sums)
    sound = inside & ~spoiled
    tl.store(log_sums + pixel, log_sum, mask=sound)
    tl.store(means + pixel, mean, mask=sound)
    _store(grad_query, query_sums * scale, pixel, heads * C, sound, C, BLOCK_C)
    if tl.max(spoiled.to(tl.int32), 0) > 0:
        for dy in range(TILE):
            for dx in range(TILE):
                if _holds(spoiled, dy, dx):
                    row_one, column_one = first_row + dy, first_column + dx
                    pixel_one = _pixel(row_one, column_one, y, x, W, DILATION)
                    q_one = _load_one(query, pixel_one, q_pixel, C, BLOCK_C)
                    g_one = _load_one(grad, pixel_one, g_pixel, C, BLOCK_C)
                    result, log_sum_one = _attend_one(
                        q_one, key, value, bias, k_pixel, v_pixel,
                        row_one, column_one, rows, columns, y, x, W, C, scale,
                        HAS_BIAS, KERNEL, DILATION, BLOCK_C, COLUMNS,
                    )  # fmt: skip
                    mean_one = tl.sum(g_one * result, 0)
                    sums_one = tl.zeros((BLOCK_C,), tl.float32)
                    for step in range(KERNEL):
                        k_one, v_one, s_one = _window_row(
                            q_one, key, value, bias, k_pixel, v_pixel, step,
                            row_one, column_one, rows, columns, y, x, W, C, scale,
                            HAS_BIAS, KERNEL, DILATION, BLOCK_C, COLUMNS,
                        )  # fmt: skip
                        grad_one = exp(s_one, log_sum_one) * (tl.sum(g_one[None, :] * v_one, 1) - mean_one)
                        sums_one += tl.sum(grad_one[:, None] * k_one, 0)
                    tl.store(log_sums + pixel_one, log_sum_one)
                    tl.store(means + pixel_one, mean_one)
                    _store_one(grad_query, sums_one * scale, pixel_one, heads * C, C, BLOCK_C)
    if HAS_BIAS:
        side = tl.arange(0, SIDE)
        used = side < 2 * KERNEL - 1
        place = side[:, None] * (2 * KERNEL - 1) + side[None, :]
        grad_bias += tl.program_id(0).to(tl.int64) * (2 * KERNEL - 1) * (2 * KERNEL - 1)
        tl.store(grad_bias + place, bias_sums, mask=used[:, None] & used[None, :])


@triton.jit
def _queries_around(first, last, length, KERNEL: tl.constexpr):
    """First and last query along a side that have one of the keys first to last in their windows."""
    begin = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    return begin, tl.where(last >= length - KERNEL, length - 1, last + KERNEL // 2)


@triton.jit(do_not_specialize=SIZES)
def _backward_keys(
    grad, query, key, value, bias, grad_key, grad_value, log_sums, means,
    g_image, g_head, g_pixel, q_image, q_head, q_pixel, k_image, k_head, k_pixel, v_image, v_head, v_pixel,
    heads, H, W, C, scale,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    image, head, y, x, first_row, first_column = _locate(heads, H, W, DILATION)
    rows, columns = _group_size(H, W, y, x, DILATION)
    key_row, key_column = _grid(first_row, first_column, TILE, TILE)
    key_inside = (key_row < rows) & (key_column < columns)
    key_pixel = _pixel(key_row, key_column, y, x, W, DILATION)
    grad += image * g_image + head * g_head
    query += image * q_image + head * q_head
    bias += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    log_sums += (image * heads + head) * H * W
    means += (image * heads + head) * H * W
    k = _load(key, key_pixel, k_pixel, key_inside, C, BLOCK_C)
    v = _load(value, key_pixel, v_pixel, key_inside, C, BLOCK_C)
    last_row, last_column = tl.minimum(first_row + TILE, rows) - 1, tl.minimum(first_column + TILE, columns) - 1
    begin_row, end_row = _queries_around(first_row, last_row, rows, KERNEL)
    begin_column, end_column = _queries_around(first_column, last_column, columns, KERNEL)
    row_steps, column_steps = (end_row - begin_row) // ROWS + 1, (end_column - begin_column) // COLUMNS + 1
    key_sums = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    value_sums = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    for step in range(row_steps * column_steps):
        block_row = begin_row + step // column_steps * ROWS
        row, column = _grid(block_row, begin_column + step % column_steps * COLUMNS, ROWS, COLUMNS)
        inside = (row < rows) & (column < columns)
        pixel = _pixel(row, column, y, x, W, DILATION)
        q = _load(query, pixel, q_pixel, inside, C, BLOCK_C)
        g = _load(grad, pixel, g_pixel, inside, C, BLOCK_C)
        log_sum = tl.load(log_sums + pixel, mask=inside, other=0.0)
        mean = tl.load(means + pixel, mask=inside, other=0.0)
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, PRECISION, KERNEL)
        p = exp(s, log_sum[:, None])
        value_sums += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        grad_scores = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        key_sums += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision=PRECISION)
    grad_key += image * H * W * heads * C + head * C
    grad_value += image * H * W * heads * C + head * C
    spoiled = key_inside & (_not_finite(key_sums) | _not_finite(value_sums))
    sound = key_inside & ~spoiled
    _store(grad_key, key_sums * scale, key_pixel, heads * C, sound, C, BLOCK_C)
    _store(grad_value, value_sums, key_pixel, heads * C, sound, C, BLOCK_C)
    if tl.max(spoiled.to(tl.int32), 0) > 0:
        for dy in range(TILE):
            for dx in range(TILE):
                if _holds(spoiled, dy, dx):
                    row_one, column_one = first_row + dy, first_column + dx
                    pixel_one = _pixel(row_one, column_one, y, x, W, DILATION)
                    k_one = _load_one(key, pixel_one, k_pixel, C, BLOCK_C)
                    v_one = _load_one(value, pixel_one, v_pixel, C, BLOCK_C)
                    begin_row, end_row = _queries_around(row_one, row_one, rows, KERNEL)
                    begin_column, end_column = _queries_around(column_one, column_one, columns, KERNEL)
                    column = begin_column + tl.arange(0, SIDE)
                    near = column <= end_column
                    key_one = tl.zeros((BLOCK_C,), tl.float32)
                    value_one = tl.zeros((BLOCK_C,), tl.float32)
                    for row in range(begin_row, end_row + 1):
                        pixel = _pixel(row, column, y, x, W, DILATION)
                        q = _load(query, pixel, q_pixel, near, C, BLOCK_C).to(tl.float32)
                        g = _load(grad, pixel, g_pixel, near, C, BLOCK_C).to(tl.float32)
                        log_sum = tl.load(log_sums + pixel, mask=near, other=0.0)
                        mean = tl.load(means + pixel, mask=near, other=0.0)
                        s = tl.sum(q * k_one[None, :], 1) * scale
                        if HAS_BIAS:
                            place = (row_one - row + KERNEL - 1) * (2 * KERNEL - 1) + column_one - column + KERNEL - 1
                            s += tl.load(bias + place, mask=near, other=0.0)
                        p = tl.where(near, exp(s, log_sum), 0.0)
                        value_one += tl.sum(p[:, None] * g, 0)
                        key_one += tl.sum((p * (tl.sum(g * v_one[None, :], 1) - mean))[:, None] * q, 0)
                    _store_one(grad_key, key_one * scale, pixel_one, heads * C, C, BLOCK_C)
                    _store_one(grad_value, value_one, pixel_one, heads * C, C, BLOCK_C)


def launch_options(query: Tensor, kernel_size: int, dilation: int, biased: bool) -> dict[str, Any]:
    """Constants of the kernels: a block has all columns around a tile, and two rows, as wide tiles spill registers."""
    channels = max(16, power_of_2(query.shape[3]))
    return {
        "HAS_BIAS": biased,
        "PRECISION": product_precision(query.dtype),
        "KERNEL": kernel_size,
        "DILATION": dilation,
        "BLOCK_C": channels,
        "ROWS": 2,
        "COLUMNS": power_of_2(8 + kernel_size - 1),
        "num_stages": 1,
        "num_warps": 8 if channels * query.element_size() > 128 else 4,
    }


def _num_programs(query: Tensor, H: int, W: int, dilation: int) -> int:
    rows, columns = (ceil_div(length, 8 * dilation) for length in (H, W))
    return query.shape[0] * query.shape[1] * dilation**2 * rows * columns


def _arguments(tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[int]]:
    """The tensors with channels side by side, and their steps from image to image, head to head and pixel to pixel."""
    rows = [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in tensors]
    return rows, [step for tensor in rows for step in tensor.stride()[:3]]


def _new_rows(tensor: Tensor) -> Tensor:
    B, h, N, c = tensor.shape
    return tensor.new_empty(B, N, h, c)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    H: int,
    W: int,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """The op `neighborhood_attn`, of float32, bfloat16 or float16."""
    out = _new_rows(query)
    if out.numel() == 0:
        return out.transpose(1, 2)
    tensors, steps = _arguments((query, key, value))
    options = launch_options(query, kernel_size, dilation, bias is not None)
    table = query if bias is None else bias.contiguous()
    numbers = (*steps, query.shape[1], H, W, query.shape[3], scale)
    launch(_forward, _num_programs(query, H, W, dilation), (*tensors, table, out), numbers, options)
    return out.transpose(1, 2)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    H: int,
    W: int,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `neighborhood_attn_backward`, of float32, bfloat16 or float16."""
    grad_query, grad_key, grad_value = (_new_rows(tensor) for tensor in (query, key, value))
    programs, side = _num_programs(query, H, W, dilation), 2 * kernel_size - 1
    biased, h = bias is not None, query.shape[1]
    grad_bias = query.new_empty((programs, side, side) if biased else 0, dtype=torch.float32)
    if grad_query.numel():
        log_sums, means = query.new_empty((2, *query.shape[:3]), dtype=torch.float32)
        tensors, steps = _arguments((grad, query, key, value))
        options = launch_options(query, kernel_size, dilation, biased) | {"SIDE": max(16, power_of_2(side))}
        table = query if bias is None else bias.contiguous()
        numbers = (*steps, h, H, W, query.shape[3], scale)
        outputs = (grad_query, grad_bias, log_sums, means)
        launch(_backward_queries, programs, (*tensors, table, *outputs), numbers, options)
        outputs = (grad_key, grad_value, log_sums, means)
        launch(_backward_keys, programs, (*tensors, table, *outputs), numbers, options)
    elif biased:
        grad_bias.zero_()
    if bias is not None:
        grad_bias = grad_bias.view(query.shape[0], h, programs // max(query.shape[0] * h, 1), side, side).sum((0, 2))
    return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2), grad_bias
