"""The discriminative loss (section 3) and the loss of the count."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import NONE, DenseTargets, attached_zero

NORMS = {"L1": 1, "L2": 2}


@dataclass(frozen=True)
class DiscriminativeSettings:
    """See the keys of the same names under ``MODEL.DISCRIMINATIVE_LOSS``."""

    delta_var: float
    delta_dist: float
    norm: str
    variance: str


@dataclass(frozen=True)
class Terms:
    """The three terms, scalars without weights, means over the images of a batch."""

    variance: Tensor
    distance: Tensor
    regulariser: Tensor


def discriminative_loss(
    embeddings: Tensor, targets: DenseTargets, settings: DiscriminativeSettings
) -> Terms:
    """Pull an instance's pixels together and push a class's instances apart (equations 1-4).

    Every class of every image is a group; instances of different groups do not affect each other.
    Terms are means over the groups of an image, then over the images; an image without instances
    counts as 0.  Background cells do not count.  Memory is cells x D and pairs of instances x D;
    sums have at least single precision.

    Args:
        embeddings: (B, D, h, w).
        targets: maps of the same h, w.
    Returns:
        terms, attached to ``embeddings`` even without instances.
    Raises:
        ValueError: maps of another size.
    """
    count, _, height, width = embeddings.shape
    if targets.owners.shape != (count, height, width):
        raise ValueError(
            f"embeddings are {tuple(embeddings.shape)}, owners {tuple(targets.owners.shape)}; "
            "expected the same batch, height and width"
        )
    order = NORMS[settings.norm]
    x = embeddings.float() if embeddings.dtype in (torch.half, torch.bfloat16) else embeddings
    inside = targets.owners != NONE
    pixels = x.movedim(1, -1)[inside]
    owners = targets.owners[inside]
    sizes = torch.bincount(owners, minlength=len(targets.images))
    means = x.new_zeros(len(sizes), x.shape[1]).index_add(0, owners, pixels)
    means = means / sizes.clamp(min=1)[:, None]

    nothing = attached_zero([x])
    has_cells = sizes > 0  # an instance may have no cell at a large stride
    groups = _Groups(targets, has_cells, count)
    far = torch.linalg.vector_norm(pixels - means[owners], order, dim=1)
    hinges = F.relu(far - settings.delta_var).square()
    if settings.variance == "pixel":
        weights = groups.weights_of_instances(sizes.to(x.dtype))
    else:
        weights = groups.weights_of_instances(has_cells.to(x.dtype)) / sizes.clamp(min=1)
    first, second = groups.pairs()
    apart = torch.linalg.vector_norm(means[first] - means[second], order, dim=1)
    repelled = F.relu(2 * settings.delta_dist - apart).square()
    norms = torch.linalg.vector_norm(means, order, dim=1)
    return Terms(
        variance=nothing + (hinges * weights[owners]).sum(),
        distance=nothing + (repelled * groups.weights_of_pairs(first, x.dtype)).sum(),
        regulariser=nothing + (norms * groups.weights_of_instances(has_cells.to(x.dtype))).sum(),
    )


class _Groups:
    """Instances grouped by image and class, and their weights in means.

    Attributes:
        of_instances: (M,) int64 group of each instance.
        sizes: (G,) int64 instances of each group that have a cell.
        shares: (G,) weight of each group: 1 / groups of its image / images.
    """

    def __init__(self, targets: DenseTargets, has_cells: Tensor, num_images: int) -> None:
        """
        Args:
            targets: see :class:`DenseTargets`.
            has_cells: (M,) bool, the instances that have a cell.
            num_images: images of the batch.
        """
        self._has_cells = has_cells
        pairs = torch.stack([targets.images, targets.classes], dim=1)
        groups, self.of_instances = pairs.unique(dim=0, return_inverse=True)
        self.sizes = torch.bincount(self.of_instances[has_cells], minlength=len(groups))
        present = (self.sizes > 0).double()
        images = groups[:, 0]
        in_image = present.new_zeros(num_images).index_add(0, images, present)
        self.shares = present / in_image.clamp(min=1)[images] / num_images

    def weights_of_instances(self, amounts: Tensor) -> Tensor:
        """(M,) share of each instance's group, divided by the total amount of the group.

        Args:
            amounts: (M,) each instance's part of its group's total.
        """
        totals = amounts.new_zeros(len(self.sizes)).index_add(0, self.of_instances, amounts)
        weights = self.shares.to(amounts.dtype) / totals.clamp(min=1)
        return weights[self.of_instances] * self._has_cells

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(P,) and (P,): the two instances of every unordered pair in a group."""
        numbers = self.of_instances
        same_group = (numbers[:, None] == numbers) & self._has_cells[:, None] & self._has_cells
        first, second = same_group.triu_(diagonal=1).nonzero().unbind(1)
        return first, second

    def weights_of_pairs(self, first: Tensor, dtype: torch.dtype) -> Tensor:
        """(P,) share of each pair's group over its unordered pairs: 2 / (C (C - 1))."""
        pairs = self.sizes * (self.sizes - 1) / 2
        return (self.shares / pairs.clamp(min=1)).to(dtype)[self.of_instances[first]]


def count_loss(counts: Tensor, targets: DenseTargets, max_count: int) -> Tensor:
    """Mean squared error of the number of instances of each image, relative to ``max_count``.

    Args:
        counts: (B,) predicted share of ``max_count``.
    """
    true = torch.bincount(targets.images, minlength=len(counts)).to(counts.dtype)
    return F.mse_loss(counts, true / max_count)
