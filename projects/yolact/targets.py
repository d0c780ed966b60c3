"""Matches anchors with instances."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from instseg.modeling import NEITHER
from instseg.projects.yolact.boxes import to_corners

_FORCED = 2.0
"""IoU given to the anchors that an instance gets whatever the overlap."""


def match(
    boxes: Tensor,
    classes: Tensor,
    crowd_boxes: Tensor,
    priors: Tensor,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    crowd_iou: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Assign the instances of one image to anchors (section 4.1, authors' code).

    Every anchor gets the instance that it overlaps most.  Then every instance gets an anchor of its
    own, in the order of falling overlaps.

    Args:
        boxes: (G, 4) relative corners.
        classes: (G,) int64 from 0.
        crowd_boxes: (M, 4) relative corners of regions full of instances.
        priors: (P, 4) relative centre and size.
        positive_iou: from this IoU on an anchor is positive.
        negative_iou: below this one it is background.
        crowd_iou: with a larger share of its area in a crowd it is not background.
    Returns:
        (P,) int64: class + 1 where positive, 0 for background, or ``NEITHER``; and (P,) int64, the
        instance of every anchor, 0 if there is none.
    """
    count = len(priors)
    labels = torch.zeros(count, dtype=torch.int64, device=priors.device)
    instances = torch.zeros_like(labels)
    corners = to_corners(priors)
    if len(boxes):
        overlaps = box_iou(boxes, corners)
        best, instances = overlaps.max(dim=0)
        for prior, index in _forced(overlaps):
            best[prior], instances[prior] = _FORCED, index
        labels = classes[instances] + 1
        labels[best < positive_iou] = NEITHER
        labels[best < negative_iou] = 0
    if len(crowd_boxes):
        part = _covered(corners, crowd_boxes)
        labels[(labels <= 0) & (part > crowd_iou)] = NEITHER
    return labels, instances


def _forced(overlaps: Tensor) -> list[tuple[int, int]]:
    """Pairs (anchor, instance), a distinct anchor for every instance.

    Args:
        overlaps: (G, P) IoU; overwritten.
    """
    pairs: list[tuple[int, int]] = []
    best, where = overlaps.max(dim=1)
    for _ in range(min(overlaps.shape)):
        index = int(best.argmax())
        prior = int(where[index])
        pairs.append((prior, index))
        overlaps[:, prior] = -1
        overlaps[index] = -1
        # Only instances that wanted the same anchor have to look for another one.
        changed = (where == prior).nonzero()[:, 0]
        best[changed], where[changed] = overlaps[changed].max(dim=1)
    return pairs


def _covered(corners: Tensor, crowd_boxes: Tensor) -> Tensor:
    """(P,) largest part of each box's area that lies in one of the crowds."""
    first = torch.maximum(corners[:, None, :2], crowd_boxes[None, :, :2])
    last = torch.minimum(corners[:, None, 2:], crowd_boxes[None, :, 2:])
    shared = (last - first).clamp(min=0).prod(dim=2)
    area = (corners[:, 2:] - corners[:, :2]).prod(dim=1)
    return shared.amax(dim=1) / area
