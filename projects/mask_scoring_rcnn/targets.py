"""Targets of the MaskIoU head: the IoU of a predicted mask and the whole instance.

A region may cut off its instance; the mask inside the region is then too small for the union.  The
authors' code extrapolates: if the region shows the part r of the instance, the whole instance has
1 / r times the area of its visible part.
"""

import numpy as np
import torch
from detectron2.structures import BitMasks, PolygonMasks
from numpy.typing import NDArray
from torch import Tensor

from instseg.masks import rle_area, to_rle

_MIN_RATIO = 1e-10


def maskiou_targets(mask_logits: Tensor, mask_targets: Tensor, ratios: Tensor) -> Tensor:
    """IoU of the predicted masks with their whole instances (section 3.2, authors' code).

    Args:
        mask_logits: (R, M, M) mask logits of the true class; above 0 counts as predicted.
        mask_targets: (R, M, M) bool, the true mask cut to the region.
        ratios: (R,) visible part of each instance, see :func:`visible_ratios`.
    Returns:
        (R,) float32 on the device of ``mask_logits``, without gradient.  0 where the mask misses
        the instance or the instance has no area; such regions do not count in the loss.
    """
    predicted = mask_logits.detach() > 0
    visible = mask_targets.to(predicted.device).flatten(1).sum(1)
    ratios = ratios.to(predicted.device)
    whole_areas = visible / ratios.clamp(min=_MIN_RATIO)
    inter = (predicted & mask_targets.to(predicted.device)).flatten(1).sum(1)
    union = (predicted.flatten(1).sum(1) + whole_areas - inter).clamp(min=1)
    return torch.where(ratios.isnan(), 0.0, inter / union)


def visible_ratios(
    masks: PolygonMasks | BitMasks, boxes: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Share of each instance's area inside its region.

    Polygons follow the authors' code to the pixel (:func:`_polygon_areas`).  It counts overlapping
    parts of an instance twice and truncates the sizes of its canvases, so a ratio may slightly
    exceed 1.

    Deviation: the authors' code does not know bit masks; here their pixels inside the region are
    counted, with its borders rounded to whole pixels.

    Args:
        masks: R instances, in pixels of the network input.
        boxes: (R, 4) the region of each, xyxy in pixels of the network input.
        image_size: (height, width) of the network input without padding.
    Returns:
        (R,) float32 on the device of ``boxes``; NaN for an instance without area.
    """
    if isinstance(masks, BitMasks):
        inside_areas, total_areas = _bitmask_areas(masks.tensor, boxes)
        return inside_areas.float() / total_areas.float()
    areas = [
        _polygon_areas(polygons, box, image_size)
        for polygons, box in zip(masks.polygons, boxes.cpu().numpy(), strict=True)
    ]
    inside_areas, total_areas = (
        torch.tensor(areas, dtype=torch.float32, device=boxes.device).view(-1, 2).T
    )
    return inside_areas / total_areas


def _bitmask_areas(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) pixels of (R, H, W) bool masks inside the boxes, and in all."""
    height, width = masks.shape[-2:]
    x1, y1, x2, y2 = boxes.to(masks.device).round()[:, :, None].unbind(1)
    x = torch.arange(width, device=masks.device)
    y = torch.arange(height, device=masks.device)
    columns = (x >= x1) & (x < x2)
    rows = (y >= y1) & (y < y2)
    inside = masks & rows[:, :, None] & columns[:, None, :]
    return inside.sum((1, 2)), masks.sum((1, 2))


def _polygon_areas(
    polygons: list[NDArray[np.float64]], box: NDArray[np.float32], image_size: tuple[int, int]
) -> tuple[float, float]:
    """Pixels of one instance inside its region and in total, drawn as the authors' code does.

    The total is over the smallest rectangle around region and instance, without the last row and
    column of the image.
    """
    if not polygons:
        return 0.0, 0.0
    height, width = image_size
    x = np.concatenate([polygon[0::2] for polygon in polygons])
    y = np.concatenate([polygon[1::2] for polygon in polygons])
    around = (
        max(min(int(box[0]), x.min()), 0),
        max(min(int(box[1]), y.min()), 0),
        min(max(int(box[2]) + 1, x.max()), width - 1),
        min(max(int(box[3]) + 1, y.max()), height - 1),
    )
    return _drawn_area(polygons, tuple(box.tolist())), _drawn_area(polygons, around)


def _drawn_area(polygons: list[NDArray[np.float64]], window: tuple[float, ...]) -> float:
    """Pixels of all polygons on a canvas that begins at a corner of ``window`` (xyxy).

    Width and height are truncated to integers, as in the authors' version of pycocotools.  Single
    precision, as in their code, decides about pixels on an edge.
    """
    x1, y1, x2, y2 = window
    height, width = int(y2 - y1), int(x2 - x1)
    if height < 1 or width < 1:
        return 0.0
    corner = np.array([x1, y1], np.float32)
    shifted = [p.astype(np.float32) - np.tile(corner, len(p) // 2) for p in polygons]
    return float(sum(rle_area(to_rle([polygon], height, width)) for polygon in shifted))
