"""Fast NMS of YOLACT (Bolya et al., ICCV 2019, section 3.3): from scored boxes to detections."""

import torch
from torch import Tensor

from instseg.ops.fast_nms import surviving_boxes


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
        equal scores is that of ``torch.topk``.  N = 0 gives M = 0.
    """
    rows, survives = surviving_boxes(boxes, scores, iou_threshold, top_k, min_score)
    classes, ranks = survives.nonzero(as_tuple=True)
    rows = rows[classes, ranks]
    best = scores[classes, rows]
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
    of_class, survives = surviving_boxes(boxes, best[None], iou_threshold, top_k, min_score)
    rows = of_class[survives][:max_detections]
    return rows, classes[rows], best[rows]
