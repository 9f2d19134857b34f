"""Triton kernels of `deform_attn`: flash attention with a position bias, and the bias's gradients without atomics.

The bias of a pair is bilinear in the fractions of its table coordinates. A first kernel writes the four coefficients of
every table pixel and of the zeros around the table, so that a pair costs 16 bytes of loads and three multiply-adds.
Biases are computed in tiles [keys, queries] whose lanes run along the queries, which read neighbouring coefficients;
only the sum is converted to the layout of the matrix products.

The backward pass stores the gradients of the scores, queries contiguous, for as many keys at a time as `CHUNK_BYTES`
hold, so that they stay in the L2 cache. Along a side, query i looks at `start + step * i` less the key's coordinate: a
table pixel gathers the queries within one pixel of it, a run whose first query and length are known. Every sum has one
owner, so that results repeat to the bit.
"""

# Triton finds out the types of its kernels' arguments when they are called.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dat.ops.triton_launch import ceil_div, exp, launch, power_of_2, product_precision

# Table columns and keys that a program of the table's gradient works on at a time.
COLUMNS, TABLE_KEYS = 32, 8
# Programs that keep a large GPU busy: those with tiles of scores, and the smaller ones of the table.
PROGRAMS, TABLE_PROGRAMS = 512, 4096
# Gradients of scores in memory at a time, unless those of one block of keys are more.
CHUNK_BYTES = 16 << 20

# Values that differ from stage to stage: kernels specialised on them would be compiled again for each.
SIZES = ["h", "group_heads", "W", "HW", "N", "T_h", "T_w"]
CHUNK = ["first_key", "last_key", "parts", "length"]


@triton.jit
def _pixel(table, head, u, v, T_h, T_w, inside):
    inside = inside & (u >= 0) & (u < T_h) & (v >= 0) & (v < T_w)
    return tl.load(table + (head * T_h + u) * T_w + v, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["pixels", "coordinates", "T_h", "T_w"])
def prepare_kernel(table, positions, coefficients, key_pixels, pixels, coordinates, T_h, T_w, BLOCK: tl.constexpr):
    """Coefficients of rows -2..T_h and columns -2..T_w of every head's table, and the keys' table coordinates.

    The four coefficients of a pixel are those of 1, fx, fy and fx * fy. Coordinates count from the table's centre.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    v, u, head = index % (T_w + 3) - 2, index // (T_w + 3) % (T_h + 3) - 2, index // ((T_w + 3) * (T_h + 3))
    a = _pixel(table, head, u, v, T_h, T_w, inside)
    b = _pixel(table, head, u, v + 1, T_h, T_w, inside)
    c = _pixel(table, head, u + 1, v, T_h, T_w, inside)
    d = _pixel(table, head, u + 1, v + 1, T_h, T_w, inside)
    # Differences of infinite entries would be NaN. Their sum says what becomes of the pairs that look them up.
    total = a + b + c + d
    finite = total - total == 0.0
    tl.store(coefficients + index * 4, tl.where(finite, a, total), mask=inside)
    tl.store(coefficients + index * 4 + 1, tl.where(finite, b - a, 0.0), mask=inside)
    tl.store(coefficients + index * 4 + 2, tl.where(finite, c - a, 0.0), mask=inside)
    tl.store(coefficients + index * 4 + 3, tl.where(finite, (d - c) - (b - a), 0.0), mask=inside)
    # No key beyond 64 meets the table; NaN is clamped there too.
    position = tl.load(positions + index, mask=index < coordinates, other=0.0)
    position = tl.minimum(tl.where(position > -64.0, position, -64.0), 64.0)
    unit = tl.where(index % 2 == 0, T_w - 1, T_h - 1).to(tl.float32) * 0.25
    tl.store(key_pixels + index, position * unit, mask=index < coordinates)


@triton.jit
def _floats(pair):
    """The two numbers of 32 bits that were loaded as one of 64."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _of_head(key_pixels, coefficients, row, h, group_heads, N, T_h, T_w):
    """Pointers to the keys and the coefficients of a head, as pairs of numbers."""
    pairs = tl.pointer_type(tl.int64)
    key_pixels = key_pixels.to(pairs) + row // group_heads * N
    return key_pixels, coefficients.to(pairs) + row % h * (T_h + 3) * (T_w + 3) * 2


@triton.jit
def _look_up(coefficients, key_pixels, keys, N, x, y, T_h, T_w):
    """The coefficients [keys, queries] of all pairs and the fractions of their table coordinates."""
    key_x, key_y = _floats(tl.load(key_pixels + keys, mask=keys < N, other=0))
    x = tl.minimum(tl.maximum(x[None, :] - key_x[:, None], -2.0), T_w.to(tl.float32))
    y = tl.minimum(tl.maximum(y[None, :] - key_y[:, None], -2.0), T_h.to(tl.float32))
    left, top = tl.floor(x), tl.floor(y)
    at = coefficients + ((top.to(tl.int32) + 2) * (T_w + 3) + left.to(tl.int32) + 2) * 2
    a, b = _floats(tl.load(at))
    c, d = _floats(tl.load(at + 1))
    return a, b, c, d, x - left, y - top


@triton.jit
def _rows(start, rows, stride, channels, C, inside):
    """Rows of one head as a matrix [rows, channels], zeros beyond its end."""
    at = start + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(at, mask=inside[:, None] & (channels < C)[None, :], other=0.0)


@triton.jit
def _store_rows(start, values, rows, stride, channels, C, inside):
    at = start + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    tl.store(at, values.to(start.dtype.element_ty), mask=inside[:, None] & (channels < C)[None, :])


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, coefficients, key_pixels, out, lse,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    start_x, step_x, start_y, step_y, scale, h, group_heads, W, HW, N, C, T_h, T_w,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(HW, M)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = row // h, row % h
    queries, channels = tl.program_id(0) % tiles * M + tl.arange(0, M), tl.arange(0, D)
    x, y = start_x + step_x * (queries % W).to(tl.float32), start_y + step_y * (queries // W).to(tl.float32)
    key_pixels, coefficients = _of_head(key_pixels, coefficients, row, h, group_heads, N, T_h, T_w)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    q = _rows(query + image * q_image + head * q_head, queries, q_row, channels, C, queries < HW)
    # With a scale of 0 only the biases remain.
    scale = tl.where(scale == 0.0, 1e-30, scale)
    inverse_scale = 1.0 / scale
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for first in range(0, N, K):
        keys = first + tl.arange(0, K)
        k = _rows(key, keys, k_row, channels, C, keys < N)
        v = _rows(value, keys, v_row, channels, C, keys < N)
        bias = tl.zeros([M, K], tl.float32)
        if BIASED:
            a, b, c, d, fx, fy = _look_up(coefficients, key_pixels, keys, N, x, y, T_h, T_w)
            bias = tl.trans(a + fx * b + fy * (c + fx * d)) * inverse_scale
        # As the initial accumulator, biases get the product's layout: maxima and sums over keys stay within a warp.
        scores = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION) * scale
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Where all scores so far are minus infinity, less zero they are still without attention.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p, shrink = exp(scores, base[:, None]), exp(top, base)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    _store_rows(out + image * q_image + head * q_head, sums / total[:, None], queries, q_row, channels, C, queries < HW)
    tl.store(lse + row * HW + queries, top + tl.log(total), mask=queries < HW)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    grad, query, key, value, coefficients, key_pixels, out, lse, dots, grad_query,
    g_image, g_head, g_row, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    o_image, o_head, o_row,
    start_x, step_x, start_y, step_y, scale, h, group_heads, W, HW, N, C, T_h, T_w,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and `dots`, the products of outputs and their gradients."""
    tiles = tl.cdiv(HW, M)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = row // h, row % h
    queries, channels = tl.program_id(0) % tiles * M + tl.arange(0, M), tl.arange(0, D)
    x, y = start_x + step_x * (queries % W).to(tl.float32), start_y + step_y * (queries // W).to(tl.float32)
    key_pixels, coefficients = _of_head(key_pixels, coefficients, row, h, group_heads, N, T_h, T_w)
    key += image * k_image + head * k_head
    value += image * v_image + head * v_head
    q = _rows(query + image * q_image + head * q_head, queries, q_row, channels, C, queries < HW)
    g = _rows(grad + image * g_image + head * g_head, queries, g_row, channels, C, queries < HW)
    o = _rows(out + image * o_image + head * o_head, queries, o_row, channels, C, queries < HW)
    dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(dots + row * HW + queries, dot, mask=queries < HW)
    log_total = tl.load(lse + row * HW + queries, mask=queries < HW, other=float("inf"))
    sums = tl.zeros([M, D], tl.float32)
    for first in range(0, N, K):
        keys = first + tl.arange(0, K)
        k = _rows(key, keys, k_row, channels, C, keys < N)
        v = _rows(value, keys, v_row, channels, C, keys < N)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if BIASED:
            a, b, c, d, fx, fy = _look_up(coefficients, key_pixels, keys, N, x, y, T_h, T_w)
            scores += tl.trans(a + fx * b + fy * (c + fx * d))
        p = exp(tl.where((keys < N)[None, :], scores, float("-inf")), log_total[:, None])
        grad_scores = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - dot[:, None])
        sums += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    grad_query += image * q_image + head * q_head
    _store_rows(grad_query, sums * scale, queries, q_row, channels, C, queries < HW)


@triton.jit(do_not_specialize=[*SIZES, *CHUNK, "rows"])
def key_kernel(
    grad, query, key, value, coefficients, key_pixels, lse, dots, sums, grad_scores,
    g_image, g_head, g_row, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    start_x, step_x, start_y, step_y, scale, h, group_heads, W, HW, N, C, T_h, T_w,
    rows, first_key, last_key, parts, length,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of the chunk's keys, summed over `length` queries.

    `sums` [parts, rows, keys of the chunk, 2 * C + 2] are those of keys, values and positions, `grad_scores`
    [rows, keys of the chunk, HW] those of the scores.
    """
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    row = (block % rows).to(tl.int64)
    image, head = row // h, row % h
    keys, channels = first_key + block // rows * K + tl.arange(0, K), tl.arange(0, D)
    inside = keys < last_key
    key_pixels, coefficients = _of_head(key_pixels, coefficients, row, h, group_heads, N, T_h, T_w)
    query += image * q_image + head * q_head
    grad += image * g_image + head * g_head
    k = _rows(key + image * k_image + head * k_head, keys, k_row, channels, C, inside)
    v = _rows(value + image * v_image + head * v_head, keys, v_row, channels, C, inside)
    grad_scores += row * (last_key - first_key) * HW
    key_sums, value_sums = tl.zeros([K, D], tl.float32), tl.zeros([K, D], tl.float32)
    x_sums, y_sums = tl.zeros([K, M], tl.float32), tl.zeros([K, M], tl.float32)
    for first in range(part * length, tl.minimum(part * length + length, HW), M):
        queries = first + tl.arange(0, M)
        q = _rows(query, queries, q_row, channels, C, queries < HW)
        g = _rows(grad, queries, g_row, channels, C, queries < HW)
        log_total = tl.load(lse + row * HW + queries, mask=queries < HW, other=float("inf"))
        dot = tl.load(dots + row * HW + queries, mask=queries < HW, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if BIASED:
            # Beyond the map, rows of the table that no query of it looks up may hold NaN.
            on_map = tl.minimum(queries, HW - 1)
            x, y = start_x + step_x * (on_map % W).to(tl.float32), start_y + step_y * (on_map // W).to(tl.float32)
            a, b, c, d, fx, fy = _look_up(coefficients, key_pixels, keys, N, x, y, T_h, T_w)
            scores += a + fx * b + fy * (c + fx * d)
            slope_x, slope_y = b + fy * d, c + fx * d
        p = exp(scores, log_total[None, :])
        value_sums += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
        score_grads = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - dot[None, :])
        key_sums += tl.dot(score_grads.to(q.dtype), q, input_precision=PRECISION)
        if BIASED:
            x_sums += score_grads * slope_x
            y_sums += score_grads * slope_y
            at = grad_scores + (keys - first_key)[:, None] * HW + queries[None, :]
            pairs = inside[:, None] & (queries < HW)[None, :]
            tl.store(at, score_grads.to(grad_scores.dtype.element_ty), mask=pairs)
    sums += ((part * rows + row) * (last_key - first_key) - first_key) * (2 * C + 2)
    _store_rows(sums, key_sums * scale, keys, 2 * C + 2, channels, C, inside)
    _store_rows(sums + C, value_sums, keys, 2 * C + 2, channels, C, inside)
    if BIASED:
        sums += keys.to(tl.int64) * (2 * C + 2) + 2 * C
        tl.store(sums, tl.sum(x_sums, 1) * (T_w - 1) * -0.25, mask=inside)
        tl.store(sums + 1, tl.sum(y_sums, 1) * (T_h - 1) * -0.25, mask=inside)


@triton.jit
def _first(pixel, key, start, step, inverse):
    """The first query within one pixel of `pixel`, and its distance; `inverse` is 1 / step, or 0."""
    query = tl.ceil((pixel - 1 - start + key) * inverse)
    return query.to(tl.int32), start + step * query - key - pixel


@triton.jit(do_not_specialize=[*SIZES, *CHUNK, "images", "H", "taps_x", "taps_y"])
def table_kernel(
    grad_scores, key_pixels, grad_table, start_x, step_x, inverse_x, start_y, step_y, inverse_y,
    images, h, group_heads, H, W, N, T_h, T_w, first_key, last_key, parts, length, taps_x, taps_y,
    V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of `length` blocks of K keys to V columns of a row of a head's table.

    The first chunk of keys, which finds nothing there, writes them.
    """
    columns, blocks = tl.cdiv(T_w, V), tl.cdiv(last_key - first_key, K)
    part, u = tl.program_id(0) % parts, tl.program_id(0) // parts % T_h
    rest = tl.program_id(0) // parts // T_h
    v, head = rest % columns * V + tl.arange(0, V), rest // columns
    key_pixels = key_pixels.to(tl.pointer_type(tl.int64)) + first_key
    sums = tl.zeros([K, V], tl.float32)
    for block in range(part * length, tl.minimum(part * length + length, images * blocks)):
        row = (block // blocks * h + head).to(tl.int64)
        key = block % blocks * K + tl.arange(0, K)
        inside = key < last_key - first_key
        key_x, key_y = _floats(tl.load(key_pixels + row // group_heads * N + key, mask=inside, other=0))
        y, far_y = _first(u, key_y, start_y, step_y, inverse_y)
        # Keys of which no query looks at this row, or at these columns, are left out.
        left, _ = _first(rest % columns * V, key_x, start_x, step_x, inverse_x)
        right, _ = _first(rest % columns * V + V - 1, key_x, start_x, step_x, inverse_x)
        rows = inside & (y < H) & (y + taps_y > 0) & (left < W) & (right + taps_x > 0)
        if tl.max(rows.to(tl.int32), 0) > 0:
            x, far_x = _first(v[None, :], key_x[:, None], start_x, step_x, inverse_x)
            at = grad_scores + row * (last_key - first_key) * H * W + ((key * H + y) * W)[:, None] + x
            for tap_x in range(taps_x):
                on_map = rows[:, None] & (x + tap_x >= 0) & (x + tap_x < W)
                column_sums = tl.zeros([K, V], tl.float32)
                for tap_y in range(taps_y):
                    pairs = on_map & ((y + tap_y >= 0) & (y + tap_y < H))[:, None]
                    weight = tl.maximum(1.0 - tl.abs(far_y + step_y * tap_y), 0.0)
                    pixels = tl.load(at + tap_y * W + tap_x, mask=pairs, other=0.0)
                    column_sums += weight[:, None] * pixels.to(tl.float32)
                sums += tl.maximum(1.0 - tl.abs(far_x + step_x * tap_x), 0.0) * column_sums
    at = grad_table + ((part.to(tl.int64) * h + head) * T_h + u) * T_w + v
    # A comparison of scalars is no mask to Triton 3.9's interpreter.
    before = tl.load(at, mask=(v < T_w) & (first_key + 0 * v > 0), other=0.0)
    tl.store(at, before + tl.sum(sums, 0), mask=v < T_w)


def _is_laid_out(tensor: Tensor) -> bool:
    """Whether this is one of the layouts of models, heads or rows first, which new tensors like it have too."""
    _, h, rows, c = tensor.shape
    image, *steps = tensor.stride()
    return image == h * rows * c and steps in ([rows * c, c, 1], [c, h * c, 1])


def _arguments(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """The tensors as kernels take them, and their steps from image to image, head to head and row to row."""
    tensors = tuple(tensor if _is_laid_out(tensor) else tensor.contiguous() for tensor in tensors)
    return [*tensors], [step for tensor in tensors for step in tensor.stride()[:3]]


@dataclass(frozen=True)
class Axis:
    """Along a side, query i looks at `start + step * i` less the key's coordinate."""

    start: float
    step: float
    # Queries within one pixel of a table pixel.
    taps: int

    @classmethod
    def of(cls, length: int, pixels: int, align_corners: bool) -> "Axis":
        steps, first = (max(length - 1, 1), -1.0) if align_corners else (length, 1 / length - 1)
        taps = -(-4 * steps // (pixels - 1)) if pixels > 1 else length
        return cls((pixels - 1) * (2 + first) / 4, (pixels - 1) / (2 * steps), taps)

    @property
    def inverse(self) -> float:
        return 1 / self.step if self.step else 0.0


class Call:
    """The arguments that all kernels of one call have in common."""

    def __init__(
        self, query: Tensor, key: Tensor, positions: Tensor, table: Tensor | None, size: list[int], align_corners: bool
    ) -> None:
        self.positions, self.size, self.biased = positions.contiguous(), size, table is not None
        _, h, HW, c = query.shape
        self.table = self.positions.new_empty(h, 1, 1) if table is None else table.contiguous()
        T_h, T_w = self.table.shape[1:]
        self.y, self.x = Axis.of(size[0], T_h, align_corners), Axis.of(size[1], T_w, align_corners)
        self.rows, self.heads = query.shape[0] * h, [h, h // positions.shape[1]]
        self.sizes = [*self.heads, size[1], HW, key.shape[2], c, T_h, T_w]
        self.axes = [self.x.start, self.x.step, self.y.start, self.y.step]
        channels = max(16, power_of_2(c))
        # Tiles of many channels are smaller, so that they fit into the registers and shared memory of small GPUs.
        self.wide = channels * query.element_size() >= 256
        self.constants = {
            "BIASED": self.biased,
            "PRECISION": product_precision(query.dtype),
            "D": channels,
            "num_warps": 8 if channels * query.element_size() > 256 else 4,
            "num_stages": 1,
        }

    @property
    def tile(self) -> dict[str, int]:
        """Queries and keys that a program works on at a time, where it keeps the queries."""
        return {"M": 32 if self.wide else 64, "K": 32}

    @property
    def key_tile(self) -> dict[str, int]:
        """The same where it keeps the keys."""
        return {"M": 32, "K": 32 if self.wide else 64}

    def prepare(self) -> tuple[Tensor, Tensor]:
        """The table's coefficients and the keys' coordinates."""
        h, T_h, T_w = self.table.shape
        coefficients = self.positions.new_empty(h, T_h + 3, T_w + 3, 4)
        key_pixels = torch.empty_like(self.positions)
        if self.biased:
            pixels, coordinates = coefficients.numel() // 4, key_pixels.numel()
            launch(
                prepare_kernel, ceil_div(max(pixels, coordinates), 256),
                (self.table, self.positions, coefficients, key_pixels), (pixels, coordinates, T_h, T_w), {"BLOCK": 256},
            )  # fmt: skip
        return coefficients, key_pixels


class TableGradient:
    """The sum of the table's gradient over chunks of keys."""

    def __init__(self, call: Call, key_pixels: Tensor, chunk: int) -> None:
        self.call, self.key_pixels = call, key_pixels
        h, T_h, T_w = call.table.shape
        self.programs = T_h * ceil_div(T_w, COLUMNS) * h
        blocks = call.rows // h * ceil_div(chunk, TABLE_KEYS)
        self.parts = call.table.new_empty(max(1, min(TABLE_PROGRAMS // self.programs, blocks)), h, T_h, T_w)

    def add(self, grad_scores: Tensor, first: int, last: int) -> None:
        """Add the contributions of the gradients [rows, last - first, H*W] of the scores of keys first..last."""
        call, parts = self.call, len(self.parts)
        images = call.rows // call.heads[0]
        length = ceil_div(images * ceil_div(last - first, TABLE_KEYS), parts)
        launch(
            table_kernel, parts * self.programs, (grad_scores, self.key_pixels, self.parts),
            (
                call.x.start, call.x.step, call.x.inverse, call.y.start, call.y.step, call.y.inverse,
                images, *call.heads, *call.size, call.sizes[4], *call.table.shape[1:], first, last, parts, length,
                call.x.taps, call.y.taps,
            ),
            {"V": COLUMNS, "K": TABLE_KEYS, "num_warps": 1},
        )  # fmt: skip

    def total(self) -> Tensor:
        """The gradient [h, T_h, T_w] of the chunks added so far."""
        return self.parts[0] if len(self.parts) == 1 else self.parts.sum(0)


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
    (query, key, value), steps = _arguments(query, key, value)
    call = Call(query, key, positions, table, size, align_corners)
    out, lse = torch.empty_like(query), positions.new_empty(query.shape[:3])
    programs = ceil_div(query.shape[2], call.tile["M"]) * call.rows
    launch(
        forward_kernel, programs, (query, key, value, *call.prepare(), out, lse),
        (*steps, *call.axes, scale, *call.sizes), call.constants | call.tile,
    )  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by query, key, value, positions and table; the last two are empty without a table."""
    B, h, HW, c = query.shape
    N, g = key.shape[2], positions.shape[1]
    (grad, query, key, value, out), steps = _arguments(grad, query, key, value, out)
    call = Call(query, key, positions, table, size, align_corners)
    coefficients, key_pixels = call.prepare()
    grad_query, dots = torch.empty_like(query), torch.empty_like(lse)
    programs = ceil_div(HW, call.tile["M"]) * call.rows
    launch(
        query_kernel, programs, (grad, query, key, value, coefficients, key_pixels, out, lse, dots, grad_query),
        (*steps, *call.axes, scale, *call.sizes), call.constants | call.tile,
    )  # fmt: skip

    M, K = call.key_tile["M"], call.key_tile["K"]
    block_bytes = K * call.rows * HW * query.element_size()
    chunk = max(CHUNK_BYTES // block_bytes, 1) * K if call.biased else N
    tiles = ceil_div(HW, M)
    length = ceil_div(tiles, max(1, PROGRAMS // (ceil_div(min(chunk, N), K) * call.rows)))
    parts = ceil_div(tiles, length)
    sums = lse.new_empty(B, h, N, 2 * c + 2)
    table_gradient = TableGradient(call, key_pixels, min(chunk, N))
    for first in range(0, N, chunk):
        last = min(first + chunk, N)
        grad_scores = query.new_empty(call.rows, last - first, HW) if call.biased else query
        part_sums = lse.new_empty(parts, B, h, last - first, 2 * c + 2)
        launch(
            key_kernel, parts * call.rows * ceil_div(last - first, K),
            (grad, query, key, value, coefficients, key_pixels, lse, dots, part_sums, grad_scores),
            (*steps[:12], *call.axes, scale, *call.sizes, call.rows, first, last, parts, length * M),
            call.constants | call.key_tile,
        )  # fmt: skip
        torch.sum(part_sums, 0, out=sums[:, :, first:last])
        if call.biased:
            table_gradient.add(grad_scores, first, last)
    grad_key = torch.empty_like(key).copy_(sums[..., :c])
    grad_value = torch.empty_like(value).copy_(sums[..., c : 2 * c])
    if not call.biased:
        return grad_query, grad_key, grad_value, lse.new_empty(0), lse.new_empty(0)
    grad_positions = sums[..., 2 * c :].unflatten(1, (g, h // g)).sum(2)
    return grad_query, grad_key, grad_value, grad_positions, table_gradient.total()
