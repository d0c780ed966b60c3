"""The discriminative loss (section 3) and what is added to it."""

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
    """Pull the pixels of an object together and push the objects of a class apart (equations 1-4).

    Every class of every image is a group of its own: objects of different groups do not see each
    other.  Terms are means over the groups of an image, then over the images; an image without
    objects counts as 0.  Cells of no object are in no sum.  Memory is cells x D and pairs of
    objects x D; sums are made in single precision at least.

    Args:
        embeddings: (B, D, h, w).
        targets: with maps of the same h, w.
    Returns:
        terms that are attached to ``embeddings`` even where there is no object.
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
    seen = sizes > 0  # an object may have no cell at a large stride
    groups = _Groups(targets, seen, count)
    far = torch.linalg.vector_norm(pixels - means[owners], order, dim=1)
    hinges = F.relu(far - settings.delta_var).square()
    if settings.variance == "pixel":
        weights = groups.weights_of_objects(sizes.to(x.dtype))
    else:
        weights = groups.weights_of_objects(seen.to(x.dtype)) / sizes.clamp(min=1)
    first, second = groups.pairs()
    apart = torch.linalg.vector_norm(means[first] - means[second], order, dim=1)
    repelled = F.relu(2 * settings.delta_dist - apart).square()
    norms = torch.linalg.vector_norm(means, order, dim=1)
    return Terms(
        variance=nothing + (hinges * weights[owners]).sum(),
        distance=nothing + (repelled * groups.weights_of_pairs(first, x.dtype)).sum(),
        regulariser=nothing + (norms * groups.weights_of_objects(seen.to(x.dtype))).sum(),
    )


class _Groups:
    """Objects by image and class, and what each counts in a mean over them.

    Attributes:
        of_objects: (M,) int64 group of each object.
        sizes: (G,) int64 objects of each group that have a cell.
        shares: (G,) weight of each group: 1 / groups of its image / images.
    """

    def __init__(self, targets: DenseTargets, seen: Tensor, num_images: int) -> None:
        """
        Args:
            targets: see :class:`DenseTargets`.
            seen: (M,) bool, the objects that have a cell.
            num_images: images of the batch.
        """
        self._seen = seen
        pairs = torch.stack([targets.images, targets.classes], dim=1)
        groups, self.of_objects = pairs.unique(dim=0, return_inverse=True)
        self.sizes = torch.bincount(self.of_objects[seen], minlength=len(groups))
        present = (self.sizes > 0).double()
        images = groups[:, 0]
        in_image = present.new_zeros(num_images).index_add(0, images, present)
        self.shares = present / in_image.clamp(min=1)[images] / num_images

    def weights_of_objects(self, amounts: Tensor) -> Tensor:
        """(M,) share of each object's group, divided among its objects by the amounts' total.

        Args:
            amounts: (M,) what each object adds to the total of its group.
        """
        totals = amounts.new_zeros(len(self.sizes)).index_add(0, self.of_objects, amounts)
        weights = self.shares.to(amounts.dtype) / totals.clamp(min=1)
        return weights[self.of_objects] * self._seen

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(P,) and (P,): both objects of every unordered pair of one group."""
        numbers = self.of_objects
        same = (numbers[:, None] == numbers) & self._seen[:, None] & self._seen
        first, second = same.triu_(diagonal=1).nonzero().unbind(1)
        return first, second

    def weights_of_pairs(self, first: Tensor, dtype: torch.dtype) -> Tensor:
        """(P,) share of each pair's group over its unordered pairs: 2 / (C (C - 1))."""
        pairs = self.sizes * (self.sizes - 1) / 2
        return (self.shares / pairs.clamp(min=1)).to(dtype)[self.of_objects[first]]


def count_loss(counts: Tensor, targets: DenseTargets, max_count: int) -> Tensor:
    """Mean squared error of the number of objects of each image, relative to ``max_count``.

    Args:
        counts: (B,) predicted share of ``max_count``.
    """
    true = torch.bincount(targets.images, minlength=len(counts)).to(counts.dtype)
    return F.mse_loss(counts, true / max_count)
