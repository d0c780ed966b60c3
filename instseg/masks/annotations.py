"""Annotations of instances, made from their masks."""

from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode
from torch import Tensor

from instseg.masks.rle import RLE, Pixels, as_text, encode, rle_area, rle_box


def annotation_of(mask: Tensor | Pixels | RLE, category: int, **more: Any) -> dict[str, Any]:
    """Annotation of an instance that is no crowd, in Detectron2's format.

    Args:
        mask: as for :func:`encode`, or a compressed RLE.
        category: contiguous class, from 0.
        more: further entries, or replacements of the usual ones.
    """
    rle = mask if isinstance(mask, dict) else encode(mask)
    return {
        "bbox": rle_box(rle),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "segmentation": rle,
        "iscrowd": 0,
        **more,
    }


def coco_annotation_of(mask: Tensor | Pixels | RLE, category_id: int) -> dict[str, Any]:
    """:func:`annotation_of` in COCO's format, for JSON; the caller adds ``id`` and ``image_id``."""
    rle = mask if isinstance(mask, dict) else encode(mask)
    return {
        "category_id": category_id,
        "segmentation": as_text(rle),
        "area": rle_area(rle),
        "bbox": rle_box(rle),
        "iscrowd": 0,
    }


def outlines(mask: Pixels) -> list[list[float]]:
    """The outer edges of a mask as polygons, one for each part.

    Polygons cannot express holes, so holes are filled.  For a mask without holes pycocotools draws
    exactly the same mask from the polygons.

    Args:
        mask: (H, W), 1 inside the instance and 0 elsewhere.
    Returns:
        ``[[x, y, x, y, ...], ...]`` in pixels, each with three points or more; (0, 0) is the upper
        left corner of the image, (0.5, 0.5) the centre of its first pixel.  Empty if the mask is.
    """
    x, y, width, height = cv2.boundingRect(np.asarray(mask, dtype=np.uint8))
    # Twice as fine, so that the grid has points at the corners and centres of pixels.
    grid = np.zeros((2 * height + 1, 2 * width + 1), dtype=np.uint8)
    grid[1::2, 1::2] = mask[y : y + height, x : x + width]
    filled = cv2.dilate(grid, np.ones((3, 3), dtype=np.uint8))
    contours, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(edge[:, 0] / 2 + (x, y)).ravel().tolist() for edge in contours if len(edge) > 2]
