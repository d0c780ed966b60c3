"""The two operators of FCIS's mask voting in Python, for installations without compiled ones.

Votes are whole numbers as in ``csrc/vote_masks/vote_masks.h``: a weight of 1 is 2^40, and sums are
exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ONE = 2.0**40


def nms_per_class(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, max_kept: int
) -> Tensor:
    """(C, R) bool, which of the boxes (R, 4) are left of each class; ``scores`` is (C, R)."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    pixels = boxes.clamp(-(2**30), 2**30).round()
    valid = boxes.isfinite().all(dim=1) & (pixels[:, :2] <= pixels[:, 2:]).all(dim=1)
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    for kept, row in zip(keep, scores, strict=True):
        order = row.argsort(descending=True, stable=True)
        order = order[(row[order] >= score_threshold) & valid[order]]
        for _ in range(max_kept):
            if not len(order):
                break
            best, order = order[0], order[1:]
            kept[best] = True
            corners, others = boxes[best], boxes[order]
            shared = torch.minimum(corners[2:], others[:, 2:])
            shared = shared - torch.maximum(corners[:2], others[:, :2]) + 1
            overlap = shared.clamp(min=0).prod(dim=1)
            union = areas[best] + areas[order] - overlap
            order = order[~(overlap / union > iou_threshold)]
    return keep


class _Samples(NamedTuple):
    """Where a linear resize reads: ``low`` and the next sample, the latter with weight ``part``."""

    low: Tensor
    high: Tensor
    part: Tensor


def _samples(positions: Tensor, last: int) -> _Samples:
    """Samples 0 to ``last`` at positions, edges repeated."""
    low = positions.clamp(min=0).floor().long()
    beyond = low >= last
    part = (positions - low).float().masked_fill((positions <= 0) | beyond, 0.0)
    low = low.clamp(max=last)
    return _Samples(low, (low + 1).clamp(max=last), part)


def _between(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    return a + part * (b - a)


class _Rendered(NamedTuple):
    """The binary mask of a RoI inside the image, and the pixels of its first row and column."""

    top: int
    left: int
    mask: Tensor


def _render(
    box: Tensor, mask: Tensor, threshold: float, height: int, width: int
) -> _Rendered | None:
    """Stretch a mask (P, P) over its box; None if no pixel of it lies in the image."""
    if not box.isfinite().all():
        return None
    x1, y1, x2, y2 = map(int, box.clamp(-(2**30), 2**30).round().tolist())
    left, right = max(x1, 0), min(x2, width - 1)
    top, bottom = max(y1, 0), min(y2, height - 1)
    if left > right or top > bottom:
        return None
    size = len(mask)

    def samples(first: int, begin: int, end: int, length: int) -> _Samples:
        centres = torch.arange(begin - first, end - first + 1, device=mask.device) + 0.5
        ratio = centres.new_tensor(size) / centres.new_tensor(length)
        return _samples(centres * ratio - 0.5, size - 1)

    rows, columns = samples(y1, top, bottom, y2 - y1 + 1), samples(x1, left, right, x2 - x1 + 1)
    values = _between(mask[rows.low], mask[rows.high], rows.part[:, None])
    a, b = values[:, columns.low], values[:, columns.high]
    inside = _between(a, b, columns.part) >= threshold
    # Monotone between two samples: where both pass, so does all between them.
    first, second = a >= threshold, b >= threshold
    return _Rendered(top, left, torch.where(first == second, first, inside))


def average_masks(
    boxes: Tensor,
    masks: Tensor,
    weights: Tensor,
    mask_threshold: float,
    height: int,
    width: int,
    from_image: bool,
) -> tuple[Tensor, Tensor]:
    """Tight boxes (N, 4) and masks (N, P, P) of the averages of masks (R, P, P), weights (N, R)."""
    count, size = len(weights), masks.shape[1]
    votes = (weights.nan_to_num(0.0).clamp(0, 1).double() * _ONE).long()
    threshold = float(masks.new_tensor(mask_threshold))
    rendered = {
        r: _render(boxes[r], masks[r], threshold, height, width)
        for r in (votes > 0).any(dim=0).nonzero()[:, 0].tolist()
    }
    out_boxes, out_masks = boxes.new_empty((count, 4)), masks.new_empty((count, size, size))
    for n in range(count):
        sums = torch.zeros((height, width), dtype=torch.long, device=masks.device)
        for r in votes[n].nonzero()[:, 0].tolist():
            voter = rendered[r]
            if voter is not None:
                rows, columns = voter.mask.shape
                part = sums[voter.top : voter.top + rows, voter.left : voter.left + columns]
                part += voter.mask * votes[n, r]
        average = (sums.double() / _ONE).float()
        box = _tight_box(average >= threshold)
        out_boxes[n] = out_boxes.new_tensor(box)
        out_masks[n] = _resample(average, box, size, from_image)
    return out_boxes, out_masks


def _tight_box(pixels: Tensor) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around the true pixels; the centre pixel if there is none."""
    height, width = pixels.shape
    rows, columns = pixels.any(dim=1).nonzero(), pixels.any(dim=0).nonzero()
    if not len(rows):
        return width // 2, height // 2, width // 2, height // 2
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _resample(
    average: Tensor, box: tuple[int, int, int, int], size: int, from_image: bool
) -> Tensor:
    """The average in ``box`` at ``size`` x ``size`` samples, see ``resample`` of vote_masks."""
    x1, y1, x2, y2 = box
    source = average if from_image else average[y1 : y2 + 1, x1 : x2 + 1]

    def samples(first: int, last: int, length: int) -> _Samples:
        dtype = torch.float32 if from_image else torch.float64
        centres = torch.arange(size, device=average.device, dtype=dtype) + 0.5
        ratio = centres.new_tensor(last - first + 1) / centres.new_tensor(size)
        offset = centres.new_tensor(first if from_image else 0)
        return _samples((offset + centres * ratio - 0.5).float(), length - 1)

    y, x = samples(y1, y2, source.shape[0]), samples(x1, x2, source.shape[1])
    upper = _between(source[y.low][:, x.low], source[y.low][:, x.high], x.part)
    lower = _between(source[y.high][:, x.low], source[y.high][:, x.high], x.part)
    return _between(upper, lower, y.part[:, None])
