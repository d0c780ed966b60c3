"""Masks of all pixels of an image, and the instances made from them."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from instseg.masks.cropped import CroppedMasks


def gt_masks_of(instances: Instances) -> Tensor:
    """Masks of the instances of a training image; draws polygons.

    Args:
        instances: with ``gt_masks`` (``BitMasks`` or ``PolygonMasks``); Detectron2 leaves the field
            out if there is no instance.
    Returns:
        (N, H, W) bool at the size of the image.
    """
    size = instances.image_size
    if not instances.has("gt_masks"):
        return torch.zeros(0, *size, dtype=torch.bool)
    masks = instances.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *size)
    pixels: Tensor = masks.tensor
    return pixels


def tight_boxes(masks: Tensor) -> Tensor:
    """The smallest boxes around masks.

    Args:
        masks: (N, H, W) bool.
    Returns:
        (N, 4) float32 xyxy, half-open; zeros for an empty mask.
    """
    count, height, width = masks.shape
    if not masks.numel():
        return torch.zeros(count, 4, device=masks.device)
    sides = []
    for hit, length in ((masks.any(dim=1), width), (masks.any(dim=2), height)):
        filled = hit.any(dim=1)
        first = hit.int().argmax(dim=1)
        last = length - hit.flip(1).int().argmax(dim=1)
        sides += [torch.where(filled, first, 0), torch.where(filled, last, 0)]
    x1, x2, y1, y2 = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def instances_from_masks(
    masks: Tensor | CroppedMasks, scores: Tensor, classes: Tensor
) -> Instances:
    """The instances of an image that have a pixel.

    Hundreds of dense masks of a large image take gigabytes, so they are not copied: the masks with
    pixels move to the front of ``masks``.

    Args:
        masks: (N, H, W) bool, written to; or cropped.
        scores, classes: (N,).
    Returns:
        ``pred_boxes`` (tight), ``scores``, ``pred_classes`` and ``pred_masks``, a view of
        ``masks`` if they are dense.
    """
    if isinstance(masks, CroppedMasks):
        boxes = masks.boxes.to(scores.device, torch.float32)
        size = masks.image_size
    else:
        boxes = tight_boxes(masks)
        size = (masks.shape[1], masks.shape[2])
    filled = boxes[:, 2] > boxes[:, 0]
    instances = Instances(size)
    instances.pred_boxes = Boxes(boxes[filled])
    instances.scores = scores[filled]
    instances.pred_classes = classes[filled]
    if isinstance(masks, CroppedMasks):
        instances.pred_masks = masks[filled]
    else:
        instances.pred_masks = _first(masks, filled)
    return instances


def _first(masks: Tensor, chosen: Tensor) -> Tensor:
    """The chosen masks, moved to the front of ``masks``, as a view."""
    rows = chosen.nonzero()[:, 0].tolist()
    for target, row in enumerate(rows):
        if target != row:
            masks[target] = masks[row]
    return masks[: len(rows)]
