"""ONNX form of the ops for torch.onnx.export: GridSample, level by level, and gathered neighbours.

    with torch.no_grad():
        torch.onnx.export(model, args, opset_version=20, custom_translation_table=translation_table())

Batch, queries and sizes of levels may be dynamic. A float16 or bfloat16 value is sampled in the dtype of the locations,
as in the ops themselves. NaN locations are up to the runtime, and levels must not be empty. Needs onnxscript.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import onnxscript.evaluator
import torch

from dat.ops._common import pairs

# Typed as Any: constants may take the place of tensors, which onnxscript's stubs lack.
op: Any = onnxscript.opset20


def translation_table() -> dict[Callable, Callable]:
    """The `custom_translation_table` of torch.onnx.export for models with this package's ops.

    Models that sample need opset 20, and torch.onnx.export fails below; neighborhood_attn, and deform_attn without a
    table, need 18 only.
    """
    return {
        torch.ops.dat.deform_sample.default: _deform_sample,
        torch.ops.dat.ms_deform_attn.default: _ms_deform_attn,
        torch.ops.dat.deform_attn.default: _deform_attn,
        torch.ops.dat.neighborhood_attn.default: _neighborhood_attn,
    }


def _deform_sample(value: Any, locations: Any, weights: Any, shapes: Sequence[Any], align_corners: bool) -> Any:
    """See `dat.ops.deform_sample`; `shapes` is h_0, w_0, h_1, ..., each an int or an INT64 scalar of the graph."""
    if weights is not None:
        return _weighted_sum(value, locations, op.Reshape(weights, [0, 0, 0, -1]), shapes, align_corners)
    samples = _samples(value, locations, shapes, align_corners)
    layout = _vector(-1, op.Shape(value, start=2), _num_queries(locations), op.Shape(locations, start=3, end=5))
    return op.CastLike(op.Transpose(op.Reshape(samples, layout), perm=[0, 3, 1, 4, 5, 2]), value)


def _ms_deform_attn(value: Any, reference: Any, offsets: Any, logits: Any, shapes: Sequence[Any]) -> Any:
    """See `dat.ops.ms_deform_attn` and, for the formula, `dat.ops.reference.sampling_points`."""
    offsets, logits = op.CastLike(offsets, reference), op.CastLike(logits, reference)
    around = op.Unsqueeze(reference, [2, 4])
    if reference.shape[-1] == 2:
        sizes = _vector(*(size for h, w in pairs(shapes) for size in (w, h)))
        locations = op.Add(around, op.Div(offsets, op.CastLike(op.Reshape(sizes, [-1, 1, 2]), reference)))
    else:
        center, box = op.Split(around, num_outputs=2, axis=-1)
        points = op.CastLike(op.Shape(offsets, start=4, end=5), reference)
        locations = op.Add(center, op.Mul(op.Mul(op.Div(offsets, points), box), op.CastLike(0.5, reference)))
    weights = op.Softmax(op.Reshape(logits, [0, 0, 0, -1]), axis=-1)
    return _weighted_sum(value, locations, weights, shapes, False)


def _deform_attn(
    query: Any,
    key: Any,
    value: Any,
    positions: Any,
    table: Any,
    size: Sequence[Any],
    scale: float,
    align_corners: bool,
) -> tuple[Any, Any]:
    """See `dat.ops.deform_attn`."""
    products = op.MatMul(op.CastLike(query, positions), op.Transpose(op.CastLike(key, positions), perm=[0, 1, 3, 2]))
    scores = op.Mul(products, op.CastLike(scale, positions))
    if table is not None:
        scores = op.Add(scores, _position_bias(table, positions, size, align_corners))
    out = op.MatMul(op.Softmax(scores, axis=-1), op.CastLike(value, positions))
    return op.CastLike(out, query), op.ReduceLogSumExp(scores, [-1], keepdims=0)


def _position_bias(table: Any, positions: Any, size: Sequence[Any], align_corners: bool) -> Any:
    """See `dat.ops.reference.position_bias`; to GridSample each group is an image, its heads are channels."""
    x, y = (_grid(length, positions, align_corners) for length in reversed(size))
    layout = _vector(*size)
    columns = op.Expand(op.Reshape(x, [1, -1]), layout)
    rows = op.Expand(op.Reshape(y, [-1, 1]), layout)
    query = op.Reshape(op.Concat(op.Unsqueeze(columns, [2]), op.Unsqueeze(rows, [2]), axis=2), [-1, 1, 2])
    keys = op.Reshape(positions, _vector(-1, 1, op.Shape(positions, start=2)))
    displacement = op.Mul(op.Sub(query, keys), op.CastLike(0.5, positions))
    groups, sides = op.Shape(positions, start=1, end=2), op.Shape(table, start=1)
    tables = op.Reshape(table, _vector(1, groups, -1, sides))
    tables = op.Expand(tables, _vector(op.Shape(positions, start=0, end=1), 1, 1, 1, 1))
    tables = op.Reshape(tables, _vector(-1, op.Shape(tables, start=2)))
    bias = _grid_sample(tables, displacement, align_corners=True)
    heads = op.Shape(table, start=0, end=1)
    return op.Reshape(bias, _vector(-1, heads, op.Shape(bias, start=2)))


def _grid(length: Any, like: Any, align_corners: bool) -> Any:
    """Coordinates -1..1 of `length` queries."""
    count = op.Reshape(_vector(length), op.Constant(value_ints=[]))
    index = op.CastLike(op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1)), like)
    if align_corners:
        last = op.Max(op.Sub(count, op.Constant(value_int=1)), op.Constant(value_int=1))
        location = op.Div(index, op.CastLike(last, like))
    else:
        location = op.Div(op.Add(index, op.CastLike(0.5, like)), op.CastLike(count, like))
    return op.Sub(op.Mul(location, op.CastLike(2.0, like)), op.CastLike(1.0, like))


def _weighted_sum(value: Any, locations: Any, weights: Any, shapes: Sequence[Any], align_corners: bool) -> Any:
    """Sum [B, Q, H, D] of a head's samples, with `weights` [B, Q, H, L*P]."""
    samples = _samples(value, locations, shapes, align_corners)
    weights = op.Transpose(weights, perm=[0, 2, 1, 3])
    weights = op.Reshape(weights, _vector(-1, 1, op.Shape(weights, start=2)))
    out = op.ReduceSum(op.Mul(samples, weights), [3], keepdims=0)
    out = op.Reshape(out, _vector(-1, op.Shape(value, start=2), _num_queries(locations)))
    return op.CastLike(op.Transpose(out, perm=[0, 3, 1, 2]), value)


def _samples(value: Any, locations: Any, shapes: Sequence[Any], align_corners: bool) -> Any:
    """Every sample [B*H, D, Q, L*P], in the dtype of `locations`; to GridSample each head is an image of a batch."""
    images = op.Transpose(op.CastLike(value, locations), perm=[0, 2, 3, 1])
    grids = op.Transpose(locations, perm=[0, 2, 1, 3, 4, 5])
    grids = op.Reshape(grids, _vector(-1, op.Shape(grids, start=2)))
    # GridSample's coordinates run from -1 to 1 across the map.
    grids = op.Sub(op.Mul(grids, op.CastLike(2.0, locations)), op.CastLike(1.0, locations))
    start, levels = op.Constant(value_ints=[0]), []
    for level, (h, w) in enumerate(pairs(shapes)):
        size = _vector(h, w)
        end = op.Add(start, op.ReduceProd(size))
        image = op.Reshape(op.Slice(images, start, end, [3]), _vector(-1, op.Shape(value, start=3), size))
        grid = op.Gather(grids, op.Constant(value_int=level), axis=2)
        levels.append(_grid_sample(image, grid, align_corners))
        start = end
    return op.Concat(*levels, axis=3)


def _grid_sample(image: Any, grid: Any, align_corners: bool) -> Any:
    # The recorder of torch's exporter knows the opset of the model; a wrong one would fail in the runtime only.
    opset: Any = getattr(onnxscript.evaluator.default(), "opset", op)
    if opset.version < op.version:
        raise ValueError("opset_version must be at least 20, where GridSample has the mode that sampling needs")
    return op.GridSample(image, grid, mode="linear", padding_mode="zeros", align_corners=int(align_corners))


def _vector(*parts: Any) -> Any:
    """One vector of ints, INT64 scalars and INT64 vectors."""
    return op.Concat(*(op.Reshape(part, [-1]) for part in parts), axis=0)


def _num_queries(locations: Any) -> Any:
    return op.Shape(locations, start=1, end=2)


def _neighborhood_attn(
    query: Any, key: Any, value: Any, bias: Any, height: Any, width: Any, kernel_size: int, dilation: int, scale: float
) -> Any:
    """See `dat.ops.neighborhood_attn` and, for the formula, `dat.ops.reference.neighbors`."""
    (rows, dy), (columns, dx) = (_axis_neighbors(length, kernel_size, dilation) for length in (height, width))
    pixel = _pairs_of_axes(op.Mul(rows, _vector(width)), columns)
    scores = op.MatMul(op.Unsqueeze(query, [3]), op.Transpose(op.Gather(key, pixel, axis=2), perm=[0, 1, 2, 4, 3]))
    scores = op.Mul(scores, op.CastLike(scale, scores))
    if bias is not None:
        side = op.Constant(value_ints=[2 * kernel_size - 1])
        table = op.Reshape(bias, [0, -1])
        biases = op.Gather(table, _pairs_of_axes(op.Mul(dy, side), dx), axis=1)
        scores = op.Add(scores, op.CastLike(op.Unsqueeze(biases, [2]), scores))
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Gather(value, pixel, axis=2))
    return op.Squeeze(out, [3])


def _axis_neighbors(length: Any, kernel_size: int, dilation: int) -> tuple[Any, Any]:
    """Neighbours [length, kernel_size] of each pixel along a side, and their displacements plus kernel_size - 1."""
    size, step = _vector(length), op.Constant(value_ints=[dilation])
    pixel = op.Range(op.Constant(value_int=0), op.Squeeze(size, [0]), op.Constant(value_int=1))
    group, place = op.Mod(pixel, step), op.Div(pixel, step)
    members = op.Div(op.Sub(op.Add(size, op.Constant(value_ints=[dilation - 1])), group), step)
    start = op.Max(op.Sub(place, op.Constant(value_ints=[kernel_size // 2])), op.Constant(value_ints=[0]))
    start = op.Min(start, op.Sub(members, op.Constant(value_ints=[kernel_size])))
    places = op.Add(op.Unsqueeze(start, [1]), op.Constant(value_ints=list(range(kernel_size))))
    displacement = op.Sub(places, op.Unsqueeze(place, [1]))
    neighbors = op.Add(op.Unsqueeze(group, [1]), op.Mul(places, step))
    return neighbors, op.Add(displacement, op.Constant(value_ints=[kernel_size - 1]))


def _pairs_of_axes(rows: Any, columns: Any) -> Any:
    """Sums [H*W, k*k] over all pairs of a row's value [H, k] and a column's [W, k]."""
    sums = op.Add(op.Unsqueeze(rows, [1, 3]), op.Unsqueeze(columns, [0, 2]))
    window = op.Mul(op.Shape(rows, start=1), op.Shape(columns, start=1))
    return op.Reshape(sums, _vector(-1, window))
