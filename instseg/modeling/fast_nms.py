"""Fast NMS of YOLACT (Bolya et al., ICCV 2019, section 3.3): from scored boxes to detections."""

import torch
from torch import Tensor

_PAIRS = 2**22
"""Number of pairs of boxes that are compared at a time, over all classes."""


def fast_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 100,
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fast NMS of every class by itself, all classes at once.

    A box is removed if a box of its class with a higher score overlaps it, even if that box is
    removed itself; this makes it a few matrix operations.  A box may stay in several classes.

    Args:
        boxes: (N, 4) corners, x1 <= x2 and y1 <= y2.
        scores: (C, N).
        iou_threshold: boxes are removed above it, not at it.
        top_k: boxes with the best scores that are considered in each class.
        max_detections: results over all classes.
        min_score: results need more than that; 0 is off.
    Returns:
        rows of ``boxes`` (M,), classes (M,) and scores (M,) by descending score.  The order of
        equal scores is not specified.  N = 0 gives M = 0.
    """
    best, rows = scores.topk(min(top_k, scores.shape[1]), dim=1)
    survives = _survives(boxes[rows], iou_threshold)
    if min_score > 0:
        survives &= best > min_score
    classes = torch.arange(len(scores), device=scores.device)[:, None].expand_as(rows)[survives]
    rows, best = rows[survives], best[survives]
    best, order = best.topk(min(max_detections, len(best)))
    return rows[order], classes[order], best


def cross_class_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 200,
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fast NMS over all classes together, every box with its best class alone.

    Args and returns: see :func:`fast_nms`.
    """
    if not scores.shape[1]:
        nothing = torch.zeros(0, dtype=torch.int64, device=scores.device)
        return nothing, nothing, scores.new_zeros(0)
    best, classes = scores.max(dim=0)
    best, rows = best.topk(min(top_k, len(best)))
    survives = _survives(boxes[rows][None], iou_threshold)[0]
    if min_score > 0:
        survives &= best > min_score
    rows, best = rows[survives][:max_detections], best[survives][:max_detections]
    return rows, classes[rows], best


def _survives(boxes: Tensor, iou_threshold: float) -> Tensor:
    """(C, K, 4) boxes by descending score → (C, K) bool, not overlapped by any before them."""
    classes, count, _ = boxes.shape
    step = max(_PAIRS // max(classes * count, 1), 1)
    parts = [boxes.new_zeros(classes, 0, dtype=torch.bool)]
    parts += [
        _last_survive(boxes[:, : start + step], start, iou_threshold)
        for start in range(0, count, step)
    ]
    return torch.cat(parts, dim=1)


def _last_survive(boxes: Tensor, start: int, iou_threshold: float) -> Tensor:
    """:func:`_survives` of the boxes from ``start`` on."""
    x1, y1, x2, y2 = boxes.unbind(2)
    areas = (x2 - x1) * (y2 - y1)
    # In place, as each of these is C x K x k numbers, k from ``start`` on.
    shared = _shared(x1, x2, start).mul_(_shared(y1, y2, start))
    union = (areas[:, :, None] + areas[:, None, start:]).sub_(shared)
    # Boxes without area overlap nothing: 0 / 0 is above no threshold.
    return ~(shared.div_(union) > iou_threshold).triu_(diagonal=1 - start).any(dim=1)


def _shared(low: Tensor, high: Tensor, start: int) -> Tensor:
    """(C, K) ends of intervals → (C, K, k) length that each shares with each from ``start`` on."""
    first = torch.maximum(low[:, :, None], low[:, None, start:])
    return torch.minimum(high[:, :, None], high[:, None, start:]).sub_(first).clamp_(min=0)
