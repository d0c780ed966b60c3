"""Masks of whole pictures, of which there should never be two copies."""

from torch import Tensor


def keep_masks(masks: Tensor, kept: Tensor) -> Tensor:
    """``masks[kept]`` without a copy: hundreds of masks of a large picture take gigabytes.

    Args:
        masks: (N, H, W); those that are kept move to the front in place.
        kept: (N,) bool.
    Returns:
        (M, H, W), a view of ``masks``.
    """
    rows = kept.nonzero()[:, 0].tolist()
    for place, row in enumerate(rows):
        if place != row:
            masks[place] = masks[row]
    return masks[: len(rows)]
