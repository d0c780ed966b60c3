"""Which boxes Fast NMS keeps (Bolya et al., YOLACT, ICCV 2019, section 3.3)."""

import torch
from torch import Tensor

from instseg.ops._library import (
    check_devices,
    expect,
    in_python,
    operator,
    register_fake,
    sum_dtype,
)

_forward = operator("fast_nms")
_PAIRS = 2**22
"""Number of pairs of boxes that the reference compares at a time, over all classes."""


def surviving_boxes(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    top_k: int,
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The best boxes of every class, and which of them no better one overlaps.

    A box is removed if a box of its class with a higher score overlaps it, even if that one is
    removed itself.  On a GPU this is :func:`surviving_boxes_reference`, on a CPU a kernel with the
    same results, which keeps no overlaps.

    Args:
        boxes: (N, 4) corners, x1 <= x2 and y1 <= y2; floating-point numbers.
        scores: (C, N) floating-point numbers.
        iou_threshold: boxes are removed above it, not at it.
        top_k: boxes that are considered in each class.
        min_score: if above 0, boxes of a class with that score or less do not survive.

    Returns:
        (C, K) int64 rows of ``boxes``, K = min(top_k, N), by descending score, and (C, K) bool,
        whether that one survives.  Boxes of equal score come in the order of ``torch.topk``.  Rows
        that do not survive are of no meaning where their score is not above ``min_score``.

    Raises:
        ValueError: shapes or numbers do not fit.
        TypeError: a dtype that is not supported.
        RuntimeError: several devices.
    """
    check_devices("fast_nms", boxes=boxes, scores=scores)
    kernel = surviving_boxes_reference if boxes.is_cuda else _forward
    rows, survives = kernel(boxes, scores, iou_threshold, top_k, min_score)
    if min_score > 0:
        survives = survives & (scores.gather(1, rows) > min_score)
    return rows, survives


@register_fake("fast_nms")
def _fake(
    boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int, min_score: float
) -> tuple[Tensor, Tensor]:
    shape = (scores.size(0), min(top_k, scores.size(1)))
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)


@in_python("fast_nms")
def surviving_boxes_reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int, min_score: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`surviving_boxes` by operators of torch, but for ``min_score``, which it ignores."""
    expect(
        boxes.dim() == 2 and boxes.shape[1] == 4,
        f"fast_nms: boxes has shape {list(boxes.shape)}; expected (N, 4)",
    )
    expect(
        scores.dim() == 2 and scores.shape[1] == boxes.shape[0],
        f"fast_nms: scores has shape {list(scores.shape)}; expected (C, {boxes.shape[0]})",
    )
    expect(top_k >= 0, f"fast_nms: top_k is {top_k}; expected at least 0")
    boxes = boxes.to(sum_dtype(boxes))  # areas are too large for half precision
    rows = scores.topk(min(top_k, scores.shape[1]), dim=1).indices
    chosen = boxes[rows]
    classes, count, _ = chosen.shape
    step = max(_PAIRS // max(classes * count, 1), 1)
    parts = [boxes.new_zeros(classes, 0, dtype=torch.bool)]
    parts += [
        _last_survive(chosen[:, : start + step], start, iou_threshold)
        for start in range(0, count, step)
    ]
    return rows, torch.cat(parts, dim=1)


def _last_survive(boxes: Tensor, start: int, iou_threshold: float) -> Tensor:
    """(C, K, 4) boxes by descending score → (C, k) bool: those from ``start`` on that survive."""
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
