"""Tiling images into figures."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torchvision.utils import make_grid

Pixels = npt.NDArray[np.uint8]

_GALLERY_GAP = 4


def gallery(images: Sequence[Pixels], columns: int) -> Pixels:
    """Tile images row by row on white.

    Args:
        images: (H, W, 3) uint8 images, possibly of different sizes; each is centred in a cell as
            large as the largest height and the largest width, and never scaled.
        columns: cells per row; fewer where there are fewer images.  One alone has no margin.
    Returns:
        (H', W', 3) uint8.
    Raises:
        ValueError: no images, or no columns.
    """
    if not len(images) or columns < 1:
        raise ValueError(f"a gallery of {len(images)} images in {columns} columns is empty")
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    cells = [torch.from_numpy(_centred(image, height, width)) for image in images]
    grid = make_grid(
        torch.stack(cells).permute(0, 3, 1, 2), columns, padding=_GALLERY_GAP, pad_value=255
    )
    return np.ascontiguousarray(grid.permute(1, 2, 0).numpy())


def _centred(image: Pixels, height: int, width: int) -> Pixels:
    """``image`` in the middle of a white one of this size."""
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    bottom, right = height - image.shape[0] - top, width - image.shape[1] - left
    white = (255, 255, 255)
    framed = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=white)
    return np.asarray(framed, dtype=np.uint8)
