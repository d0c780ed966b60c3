"""Box arithmetic of FCIS in continuous corners.

The authors count pixels inclusively: a box (x1, y1, x2, y2) holds its last row and column and is
x2 - x1 + 1 wide.  Stored as (x1, y1, x2 + 1, y2 + 1), it has the usual width, IoU and regression
deltas; only clipping, pooling and pasting have to convert.
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes clipped to the image, at least a pixel wide and high.

    Args:
        boxes: (..., 4) continuous corners.
        image_size: height and width in the same pixels.
    Returns:
        (..., 4) with x1 in [0, W - 1], x2 in [1, W], and y alike, as the authors clip inclusive
        corners to [0, W - 1].
    """
    height, width = image_size
    smallest = boxes.new_tensor([0, 0, 1, 1])
    largest = boxes.new_tensor([width - 1, height - 1, width, height])
    return torch.minimum(torch.maximum(boxes, smallest), largest)


def refine_boxes(
    boxes: Tensor, deltas: Tensor, transform: Box2BoxTransform, image_size: tuple[int, int]
) -> Tensor:
    """Boxes after one regression by the box branch, clipped.

    Args:
        boxes: (R, 4) continuous corners.
        deltas: (R, 8) output of the box branch; the last four, of the foreground, are used, the
            first four, of the background, are not.
        transform: with the weights 1 / standard deviation.
        image_size: height and width of the network input.
    Returns:
        (R, 4).
    """
    refined: Tensor = transform.apply_deltas(deltas[:, 4:].float(), boxes)
    return clip_boxes(refined, image_size)


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """RoIs for the pooling operators.

    Args:
        boxes: (R_i, 4) continuous corners of every image.
    Returns:
        (R, 5) rows (index of the image, x1, y1, x2, y2) with inclusive corners.
    """
    rows = [
        torch.cat(
            [corners.new_full((len(corners), 1), i), corners[:, :2], corners[:, 2:] - 1], dim=1
        )
        for i, corners in enumerate(boxes)
    ]
    return torch.cat(rows)
