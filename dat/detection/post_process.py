"""Converts the outputs of a model to detections in pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from dat.detection.matcher import Scores, check_scores
from dat.ops.sizes import sym_min


@torch.no_grad()
def post_process(
    outputs: dict[str, Tensor], sizes: Tensor, scores: Scores = "sigmoid", top_k: int = 100
) -> list[dict[str, Tensor]]:
    """The best detections of every image, as in the official implementations.

    Args:
        outputs, sizes, scores, top_k: see best_detections.

    Returns:
        B times "scores" [k], decreasing, "labels" [k] and "boxes" [k, 4], xyxy in pixels, not clipped to the image;
        k is top_k or the number of candidates, whichever is less.
    """
    values, labels, boxes, _ = best_detections(outputs, sizes, scores, top_k)
    return [{"scores": s, "labels": label, "boxes": b} for s, label, b in zip(values, labels, boxes, strict=True)]


def best_detections(
    outputs: dict[str, Tensor], sizes: Tensor, scores: Scores = "sigmoid", top_k: int = 100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """post_process for all images at once, as an exported graph does it.

    Args:
        outputs: "pred_logits" [B, Q, K] and "pred_boxes" [B, Q, 4], cxcywh in 0..1.
        sizes: [B, 2], (height, width) that the boxes are scaled to.
        scores: "sigmoid": the best pairs of a query and a class, so a query may appear under several classes;
            "softmax": every query under its best class but the last, which is "no object".
        top_k: how many are kept at most.

    Returns:
        scores [B, k], decreasing, labels [B, k], boxes [B, k, 4], xyxy in pixels, and their queries [B, k].
    """
    check_scores(scores)
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if sizes.shape != (logits.shape[0], 2):
        raise ValueError(f"sizes has shape {tuple(sizes.shape)}, should be [B, 2] = {(logits.shape[0], 2)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if scores == "sigmoid":
        candidates = logits.to(dtype).sigmoid().flatten(1)
        values, index = candidates.topk(sym_min(top_k, candidates.shape[1]))
        query, labels = index // logits.shape[2], index % logits.shape[2]
    else:
        values, best = logits.to(dtype).softmax(-1)[..., :-1].max(-1)
        values, query = values.topk(sym_min(top_k, values.shape[1]))
        labels = best.gather(1, query)
    height, width = sizes.to(boxes.device, dtype).unbind(1)
    corners = box_convert(boxes.to(dtype), "cxcywh", "xyxy") * torch.stack((width, height, width, height), 1)[:, None]
    return values, labels, corners.gather(1, query[..., None].expand(-1, -1, 4)), query


def select_detections(found: Sequence[Tensor], nms: float = 1.0, one_class: bool = False) -> list[Tensor]:
    """Selects among the detections of one image, which are given as best_detections gives them.

    Args:
        found: scores [k], decreasing, labels [k], boxes [k, 4] and queries [k].
        nms: a detection is dropped if its IoU with a better one of its class is larger; 1: none is.
        one_class: only the best class of each query is kept; a query of a sigmoid detector may appear under several.

    Returns:
        Those of the kept detections, in the same order.
    """
    scores, labels, boxes, queries = found
    kept = torch.arange(len(scores), device=scores.device)
    if one_class:
        firsts = np.unique(queries.cpu().numpy(), return_index=True)[1]
        kept = torch.from_numpy(np.sort(firsts)).to(kept)
    if nms < 1:
        # It moves boxes of different classes apart, so far that float32 would round those of a thousand classes.
        some = batched_nms(boxes[kept].cpu().double(), scores[kept].cpu().double(), labels[kept].cpu(), nms)
        kept = kept[some.sort().values.to(kept.device)]
    return [values[kept] for values in found]
