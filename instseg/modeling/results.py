"""What an input asks of the result of a prediction."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from instseg.masks import CroppedMasks, Pixels

DENSE, CROPPED = MASK_FORMS = ("dense", "cropped")
"""Values of ``masks`` of an input, and of ``TEST.MASKS``."""


class PlacedMask(NamedTuple):
    """A part of the image that holds the whole of a mask.

    Attributes:
        row: number of the instance.
        x, y: upper left pixel of the part, inside the image.
        pixels: (h, w) bool, inside the image.
    """

    row: int
    x: int
    y: int
    pixels: Tensor


def result_size(item: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the masks that an input asks for.

    Args:
        item: Detectron2's input of a model: ``height`` and ``width`` if they are asked for, else
            those of its ``image`` (C, h, w) count.
    """
    height, width = item["image"].shape[-2:]
    return int(item.get("height", height)), int(item.get("width", width))


def wants_cropped(item: Mapping[str, Any]) -> bool:
    """Whether an input asks for :class:`instseg.masks.CroppedMasks`."""
    return item.get("masks", DENSE) == CROPPED


def cropped(result: dict[str, Any]) -> dict[str, Any]:
    """A model's result for an image, its masks cropped if the model gives dense ones."""
    instances = result.get("instances")
    if instances is not None and instances.has("pred_masks"):
        instances.pred_masks = CroppedMasks.of(instances.pred_masks)
    return result


def masks_of(
    placed: Iterable[PlacedMask],
    count: int,
    size: tuple[int, int],
    *,
    cropped: bool,
    device: torch.device | str,
) -> Tensor | CroppedMasks:
    """The masks of an image from their parts, which are taken one by one.

    Args:
        placed: one for each instance, in any order.
        count: N, number of the instances.
        size: height and width of the image.
        cropped: give cropped masks, else dense ones.
        device: of dense masks.
    Returns:
        (N, H, W) bool, or N cropped masks; a mask comes at its ``row``.
    """
    if not cropped:
        masks = torch.zeros(count, *size, dtype=torch.bool, device=device)
        for row, x, y, pixels in placed:
            masks[row, y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        return masks
    rows: list[int] = []

    def parts() -> Iterator[tuple[int, int, Pixels]]:
        for row, x, y, pixels in placed:
            rows.append(row)
            yield x, y, pixels.cpu().numpy()

    cropped_masks = CroppedMasks.from_parts(parts(), size)
    return cropped_masks if rows == sorted(rows) else cropped_masks[np.argsort(rows)]
