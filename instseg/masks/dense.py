"""Masks of all pixels of an image, and the instances made from them."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor


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


def instances_from_masks(masks: Tensor, scores: Tensor, classes: Tensor) -> Instances:
    """The instances of an image that have a pixel.

    Hundreds of masks of a large image take gigabytes, so they are not copied: the masks with pixels
    move to the front of ``masks``.

    Args:
        masks: (N, H, W) bool, written to.
        scores, classes: (N,).
    Returns:
        ``pred_boxes`` (tight), ``scores``, ``pred_classes`` and ``pred_masks``, a view of
        ``masks``.
    """
    boxes = tight_boxes(masks)
    filled = boxes[:, 2] > boxes[:, 0]
    rows = filled.nonzero()[:, 0].tolist()
    for target, row in enumerate(rows):
        if target != row:
            masks[target] = masks[row]
    height, width = masks.shape[1:]
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(boxes[filled])
    instances.scores = scores[filled]
    instances.pred_classes = classes[filled]
    instances.pred_masks = masks[: len(rows)]
    return instances
