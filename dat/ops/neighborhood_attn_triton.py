"""Triton kernels of `neighborhood_attn` for GPUs; imported with the first call, as triton is not needed elsewhere.

A program takes a tile of 8 x 8 queries (or of keys) and loops over the pixels around it one block at a time: with a
window of 7 x 7 these are 14 x 14 pixels, in seven blocks of 2 x 16. No two programs add to the same number, so that
sums are always taken in the same order.
"""

# Kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)
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
    return (head // heads).to(tl.int64), head % heads, group // DILATION, group % DILATION, row, column


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
    q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS: tl.constexpr, K: tl.constexpr
):
    """Scores of queries and keys, minus infinity for those that are no neighbours; pixels outside the map have none."""
    first_row, first_column = _window_start(row, rows, K)[:, None], _window_start(column, columns, K)[:, None]
    dy, dx = key_row[None, :] - first_row, key_column[None, :] - first_column
    near = (dy >= 0) & (dy < K) & (dx >= 0) & (dx < K) & ((row < rows) & (column < columns))[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    if HAS_BIAS:
        place = (key_row[None, :] - row[:, None] + K - 1) * (2 * K - 1) + key_column[None, :] - column[:, None] + K - 1
        scores += tl.load(bias + place, mask=near, other=0.0)
    return tl.where(near, scores, float("-inf"))


@triton.jit
def _exp(scores, shift):
    """exp(scores - shift) in two instructions; tl.exp takes six, as it keeps numbers below 1e-38."""
    return tl.exp2(scores * LOG2E - shift * LOG2E)


@triton.jit
def _finite(top):
    """The largest score so far, or 0 where there was none: minus infinity less itself is not a number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query, key, value, bias, out, q_image, q_head, q_pixel, k_image, k_head, k_pixel, v_image, v_head, v_pixel,
    heads, H, W, C, scale,
    HAS_BIAS: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    image, head, y, x, first_row, first_column = _locate(heads, H, W, DILATION)
    rows, columns = _group_size(H, W, y, x, DILATION)
    row, column = _grid(first_row, first_column, TILE, TILE)
    inside = (row < rows) & (column < columns)
    pixel = _pixel(row, column, y, x, W, DILATION)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    bias += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    q = _load(query + image * q_image + head * q_head, pixel, q_pixel, inside, C, BLOCK_C)
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
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, KERNEL)
        higher = tl.maximum(top, tl.max(s, 1))
        shrink, p = _exp(top, _finite(higher)), _exp(s, _finite(higher)[:, None])
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        top = higher
    out += image * H * W * heads * C + head * C
    _store(out, sums / total[:, None], pixel, heads * C, inside, C, BLOCK_C)


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
    HAS_BIAS: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    image, head, y, x, first_row, first_column = _locate(heads, H, W, DILATION)
    rows, columns = _group_size(H, W, y, x, DILATION)
    row, column = _grid(first_row, first_column, TILE, TILE)
    inside = (row < rows) & (column < columns)
    pixel = _pixel(row, column, y, x, W, DILATION)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    bias += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    q = _load(query + image * q_image + head * q_head, pixel, q_pixel, inside, C, BLOCK_C)
    g = _load(grad + image * g_image + head * g_head, pixel, g_pixel, inside, C, BLOCK_C)
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
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, KERNEL)
        higher = tl.maximum(top, tl.max(s, 1))
        shrink, p = _exp(top, _finite(higher)), _exp(s, _finite(higher)[:, None])
        total = total * shrink + tl.sum(p, 1)
        mean = mean * shrink + tl.sum(p * tl.dot(g, tl.trans(v), input_precision="tf32x3"), 1)
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
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, KERNEL)
        grad_attention = tl.dot(g, tl.trans(v), input_precision="tf32x3")
        grad_scores = _exp(s, log_sum[:, None]) * (grad_attention - mean[:, None])
        query_sums += tl.dot(grad_scores.to(k.dtype), k, input_precision="tf32x3")
        if HAS_BIAS:
            bias_sums += _bias_sums(grad_scores, row, column, key_row, key_column, k.dtype, KERNEL, SIDE, ROWS, COLUMNS)
    place = (image * heads + head) * H * W + pixel
    tl.store(log_sums + place, log_sum, mask=inside)
    tl.store(means + place, mean, mask=inside)
    grad_query += image * H * W * heads * C + head * C
    _store(grad_query, query_sums * scale, pixel, heads * C, inside, C, BLOCK_C)
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
    HAS_BIAS: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    image, head, y, x, first_row, first_column = _locate(heads, H, W, DILATION)
    rows, columns = _group_size(H, W, y, x, DILATION)
    key_row, key_column = _grid(first_row, first_column, TILE, TILE)
    key_inside = (key_row < rows) & (key_column < columns)
    key_pixel = _pixel(key_row, key_column, y, x, W, DILATION)
    grad += image * g_image + head * g_head
    query += image * q_image + head * q_head
    bias += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    k = _load(key + image * k_image + head * k_head, key_pixel, k_pixel, key_inside, C, BLOCK_C)
    v = _load(value + image * v_image + head * v_head, key_pixel, v_pixel, key_inside, C, BLOCK_C)
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
        place = (image * heads + head) * H * W + pixel
        log_sum = tl.load(log_sums + place, mask=inside, other=0.0)
        mean = tl.load(means + place, mask=inside, other=0.0)
        s = _scores(q, k, bias, row, column, key_row, key_column, rows, columns, scale, HAS_BIAS, KERNEL)
        p = _exp(s, log_sum[:, None])
        value_sums += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="tf32x3")
        grad_scores = p * (tl.dot(g, tl.trans(v), input_precision="tf32x3") - mean[:, None])
        key_sums += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision="tf32x3")
    base = image * H * W * heads * C + head * C
    _store(grad_key + base, key_sums * scale, key_pixel, heads * C, key_inside, C, BLOCK_C)
    _store(grad_value + base, value_sums, key_pixel, heads * C, key_inside, C, BLOCK_C)


def launch_options(query: Tensor, kernel_size: int, dilation: int, biased: bool) -> dict[str, Any]:
    """Constants of the kernels: a block has all columns around a tile, and two rows, as wide tiles spill registers."""
    channels = max(16, _power_of_2(query.shape[3]))
    return {
        "HAS_BIAS": biased,
        "KERNEL": kernel_size,
        "DILATION": dilation,
        "BLOCK_C": channels,
        "ROWS": 2,
        "COLUMNS": _power_of_2(8 + kernel_size - 1),
        "num_stages": 1,
        "num_warps": 8 if channels * query.element_size() > 128 else 4,
    }


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _num_programs(query: Tensor, H: int, W: int, dilation: int) -> int:
    rows, columns = (-(-length // (8 * dilation)) for length in (H, W))
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
    with torch.cuda.device_of(query):
        _forward[(_num_programs(query, H, W, dilation),)](
            *tensors, table, out, *steps, query.shape[1], H, W, query.shape[3], scale, **options
        )
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
        options = launch_options(query, kernel_size, dilation, biased)
        table = query if bias is None else bias.contiguous()
        numbers = (*steps, h, H, W, query.shape[3], scale)
        with torch.cuda.device_of(query):
            _backward_queries[(programs,)](
                *tensors,
                table,
                grad_query,
                grad_bias,
                log_sums,
                means,
                *numbers,
                **options,
                SIDE=max(16, _power_of_2(side)),
            )
            _backward_keys[(programs,)](*tensors, table, grad_key, grad_value, log_sums, means, *numbers, **options)
    elif biased:
        grad_bias.zero_()
    if bias is not None:
        grad_bias = grad_bias.view(query.shape[0], h, programs // max(query.shape[0] * h, 1), side, side).sum((0, 2))
    return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2), grad_bias
