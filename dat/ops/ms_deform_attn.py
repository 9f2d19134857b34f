"""Multi-scale deformable attention of Deformable DETR on the sampling op."""

from torch import Tensor

from dat.ops.deform_sample import Shapes, deform_sample
from dat.ops.reference import sampling_points


def ms_deform_attn(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Multi-scale deformable attention, from linear outputs to the weighted sum (Deformable DETR, equation 3).

    Args:
        value: [B, S, H, D], L levels flattened row by row and laid end to end; any floating dtype.
        shapes: ((h_0, w_0), ..., (h_{L-1}, w_{L-1})), S = sum of h_l * w_l.
        reference: [B, Q, L, 2] points (x, y) or [B, Q, L, 4] boxes (cx, cy, w, h), 0 to 1 across the level.
        offsets: [B, Q, H, L, P, 2], in pixels of the level (points) or in w/(2P), h/(2P) (boxes).
        logits: [B, Q, H, L, P], turned into attention by a softmax over the L*P samples of a head.

    Returns:
        [B, Q, H, D] in the dtype of `value`.

    Raises:
        ValueError: shapes of the arguments do not fit together; the message names the argument.
    """
    if reference.ndim != 4 or reference.shape[-1] not in (2, 4) or reference.shape[2] != len(shapes):
        raise ValueError(f"reference must be [B, Q, {len(shapes)}, 2 or 4], got {tuple(reference.shape)}")
    if offsets.ndim != 6 or offsets.shape[3] != len(shapes):
        raise ValueError(f"offsets must be [B, Q, H, {len(shapes)}, P, 2] to fit shapes, got {tuple(offsets.shape)}")
    if logits.shape != offsets.shape[:-1]:
        raise ValueError(
            f"logits must have the shape of offsets [B, Q, H, L, P, 2] without its last dimension, "
            f"got offsets {tuple(offsets.shape)} and logits {tuple(logits.shape)}"
        )
    if offsets.shape[:2] != reference.shape[:2]:
        raise ValueError(
            f"offsets must begin with B, Q = {tuple(reference.shape[:2])} as reference, got {tuple(offsets.shape)}"
        )
    return deform_sample(value, shapes, *sampling_points(shapes, reference, offsets, logits))
