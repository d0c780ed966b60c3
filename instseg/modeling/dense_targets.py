"""Dense targets of bottom-up methods: which instance and class every pixel belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor

from instseg.masks import gt_masks_of

NONE = -1
"""In :attr:`DenseTargets.owners`: the pixel belongs to no instance."""
IGNORED = 255
"""In :attr:`DenseTargets.semantic`: the pixel is in no image, only in the padding of a batch."""


@dataclass(frozen=True)
class DenseTargets:
    """Label maps of a batch of B images with M instances in all.

    Attributes:
        owners: (B, h, w) int64, the instance at each cell, 0 ... M - 1, or ``NONE``.
        semantic: (B, h, w) int64, 0 for background, class + 1, or ``IGNORED``.
        images: (M,) int64, the image of each instance.
        classes: (M,) int64, the class of each instance from 0.
    """

    owners: Tensor
    semantic: Tensor
    images: Tensor
    classes: Tensor


def dense_targets(
    instances: Sequence[Instances], size: tuple[int, int], stride: int, device: torch.device
) -> DenseTargets:
    """Label maps of training images; where instances overlap, a pixel belongs to the smallest.

    A cell has the labels of the pixel below and to the right of its centre, of the centre itself
    for an odd stride, so that maps up-sampled bilinearly without aligned corners fit the image.

    Args:
        instances: of each image, with ``gt_classes`` and ``gt_masks`` (``BitMasks`` or
            ``PolygonMasks``), which may be missing where there is no instance.
        size: height and width of the padded batch, multiples of ``stride``; images lie at its
            top left.
        stride: pixels per cell.
    Returns:
        maps of (height / stride, width / stride) cells.
    Raises:
        ValueError: the size is no multiple of the stride or smaller than an image.
    """
    height, width = size
    if height % stride or width % stride:
        raise ValueError(f"size {size} is no multiple of stride {stride}")
    shape = (len(instances), height // stride, width // stride)
    owners = torch.full(shape, NONE, device=device)
    semantic = torch.full(shape, IGNORED, device=device)
    images, classes = [], []
    first = 0
    for number, of_image in enumerate(instances):
        if of_image.image_size[0] > height or of_image.image_size[1] > width:
            raise ValueError(f"an image of {of_image.image_size} does not fit into {size}")
        masks = _cells(of_image, stride).to(device)
        kinds = of_image.gt_classes.to(device)
        if not len(masks):
            # Background everywhere; argmax over no instance is not defined.
            semantic[number, : masks.shape[1], : masks.shape[2]] = 0
            continue
        # The first of the masks at each cell once they are sorted from small to large.
        order = masks.sum(dim=(1, 2)).argsort(stable=True)
        covered = masks.any(dim=0)
        owner = order[masks[order].view(torch.uint8).argmax(dim=0)]
        cells = (number, slice(masks.shape[1]), slice(masks.shape[2]))
        owners[cells] = torch.where(covered, owner + first, NONE)
        semantic[cells] = torch.where(covered, kinds[owner] + 1, 0)
        images.append(torch.full_like(kinds, number))
        classes.append(kinds)
        first += len(kinds)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return DenseTargets(
        owners, semantic, torch.cat([nothing, *images]), torch.cat([nothing, *classes])
    )


def _cells(instances: Instances, stride: int) -> Tensor:
    """(G, ceil(H / stride), ceil(W / stride)) bool masks of one image at a stride."""
    height, width = instances.image_size
    masks = gt_masks_of(instances)
    # A cell at the edge may have its centre outside the image: its last pixel then.
    rows = centres(height, stride, masks.device)
    columns = centres(width, stride, masks.device)
    return masks[:, rows][:, :, columns]


def centres(length: int, stride: int, device: torch.device) -> Tensor:
    """(ceil(length / stride),) index of the pixel that stands for each cell."""
    return torch.arange(stride // 2, length + stride // 2, stride, device=device).clamp(
        max=length - 1
    )
