"""Attention over deformed positions with DAT's continuous relative position bias."""

from torch import Tensor

from dat.ops import reference


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
    """DAT's attention (CVPR 2022, equations 4 and 5): softmax(scale * q k^T + bias) v.

    Args:
        query: [B, h, H*W, c], the queries of a map of `size`.
        key, value: [B, h, N, c], at N deformed positions.
        positions: [B, g, N, 2], (x, y) in -1..1, one set for each group of h/g heads.
        table: [h, T_h, T_w]; the bias of (query q, key n) is its bilinear value, zero outside, at
            (grid(q) - positions[n]) / 2, where -1 and 1 are the centres of the table's corner cells. None: no bias.
        size: (H, W) of the query map.
        scale: factor of the scores.
        align_corners: grid(q) is i/(H-1)*2-1 (release 2023), else (i+.5)/H*2-1 (release 2022).

    Returns:
        [B, h, H*W, c] in the dtype of `query`.

    Raises:
        ValueError: shapes of the arguments do not fit together; the message names the argument.
    """
    B, h, queries, c = query.shape
    if queries != size[0] * size[1]:
        raise ValueError(
            f"query must have H*W = {size[0] * size[1]} entries for size {tuple(size)}, got {tuple(query.shape)}"
        )
    if key.shape[:2] != (B, h) or key.shape[-1] != c or value.shape != key.shape:
        raise ValueError(f"key and value must be [{B}, {h}, N, {c}], got {tuple(key.shape)} and {tuple(value.shape)}")
    groups = positions.shape[1]
    if positions.shape != (B, groups, key.shape[2], 2) or h % groups:
        raise ValueError(
            f"positions must be [{B}, g, {key.shape[2]}, 2] with g a divisor of {h} heads, got {tuple(positions.shape)}"
        )
    if table is not None and (table.ndim != 3 or table.shape[0] != h):
        raise ValueError(f"table must be [{h}, T_h, T_w], got {tuple(table.shape)}")
    return reference.deform_attn(
        query, key, value, positions, table, size=size, scale=scale, align_corners=align_corners
    )
