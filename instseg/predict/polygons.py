"""Masks as polygons in the form of COCO."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

from instseg.data.images import Array


def outlines(mask: Array) -> list[list[float]]:
    """The outer edges of a mask as polygons, one for each part.

    A polygon is no mask: it cannot express holes, which are filled.  Without them pycocotools draws
    the polygons as the mask they come from.

    Args:
        mask: (H, W), 1 inside the object and 0 elsewhere.
    Returns:
        ``[[x, y, x, y, ...], ...]`` in pixels, of three points or more each; (0, 0) is the upper
        left corner of the image, (0.5, 0.5) the centre of its first pixel.  Empty for a mask
        without pixels.
    """
    x, y, width, height = cv2.boundingRect(np.asarray(mask, dtype=np.uint8))
    # Twice as fine, so that corners of pixels and their centres are points of the grid.
    grid = np.zeros((2 * height + 1, 2 * width + 1), dtype=np.uint8)
    grid[1::2, 1::2] = mask[y : y + height, x : x + width]
    filled = cv2.dilate(grid, np.ones((3, 3), dtype=np.uint8))
    found, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(contour[:, 0] / 2 + (x, y)).ravel().tolist() for contour in found if len(contour) > 2]


def as_rle(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """The RLE of all polygons of an object in an image of ``height`` x ``width`` pixels."""
    rle = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
