"""Masks of the size of an image, without holding many of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from instseg.masks import CroppedMasks, Pixels
from instseg.ops.assemble_masks import assemble_masks

_BYTES = 2**26
"""Bytes of the masks that are assembled together, unless one mask has more."""
_REACH = 3
"""Cells of the prototypes beyond which no mask reaches out of its box."""


def assemble_cropped(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, size: tuple[int, int]
) -> CroppedMasks:
    """:func:`instseg.ops.assemble_masks.assemble_masks`, cropped; a few masks at a time.

    Args:
        prototypes, coefficients, boxes, size: as there.
    """
    height, width = size
    limits = torch.tensor([width, height], device=boxes.device)
    cells = limits / torch.tensor([prototypes.shape[1], prototypes.shape[0]], device=boxes.device)
    reach = _REACH * cells + 1
    # A box with a NaN gives an empty mask, so any part of the image holds it.
    finite = boxes.nan_to_num()
    low = torch.minimum(finite[:, :2], finite[:, 2:]) - reach
    high = torch.maximum(finite[:, :2], finite[:, 2:]) + reach
    first, last = (torch.minimum(x.clamp(min=0), limits).long().tolist() for x in (low, high))
    step = max(_BYTES // (height * width), 1)

    def parts() -> Iterator[tuple[int, int, Pixels]]:
        for start in range(0, len(boxes), step):
            part = slice(start, start + step)
            masks = assemble_masks(prototypes, coefficients[part], boxes[part], size)
            for mask, (x1, y1), (x2, y2) in zip(masks, first[part], last[part], strict=True):
                yield x1, y1, mask[y1:y2, x1:x2].cpu().numpy()

    return CroppedMasks.from_parts(parts(), size)
