"""From components to instances: candidate pairs, crops around them, greedy merging (section 5)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

CROP_SIZE = 64
"""Pixels of a crop's side."""
CROP_CHANNELS = 10
_MARGIN = 0.1
_JITTER = 0.1


@dataclass(frozen=True)
class MergeSettings:
    """Candidate pairs of components, and when they are merged.

    Attributes:
        min_area: least pixels of a component of a pair.
        max_components: number of candidates, the largest components; bounds the cost of a noisy
            image.
        max_gap: largest gap between the boxes of a pair, as a share of their longest side.
        partners: number of nearest components that each is paired with.
        threshold: pairs with a higher probability are merged.
    """

    min_area: int
    max_components: int
    max_gap: float
    partners: int
    threshold: float


@dataclass
class Components:
    """Components of one image.

    Attributes:
        map: (H, W) int64, 0 ... N - 1, -1 for none.
        classes: (N,) int64, class + 1.
        areas: (N,) pixels; 0 for a component that was merged into another.
        boxes: (N, 4) corners in pixels, float32.
    """

    map: Tensor
    classes: Tensor
    areas: Tensor
    boxes: Tensor

    @classmethod
    def from_map(cls, components: Tensor, semantic: Tensor) -> "Components":
        """Measure components, each of one class of ``semantic`` (H, W)."""
        inside = components >= 0
        numbers = components[inside]
        areas = numbers.bincount()
        count = len(areas)
        rows, columns = (axis.float() for axis in inside.nonzero(as_tuple=True))
        corners = []
        for axis, extra in ((columns, 0), (rows, 0), (columns, 1), (rows, 1)):
            corner = torch.zeros(count, device=components.device)
            reduction = "amax" if extra else "amin"
            corner.scatter_reduce_(0, numbers, axis + extra, reduction, include_self=False)
            corners.append(corner)
        classes = torch.zeros(count, dtype=torch.int64, device=components.device)
        classes.scatter_reduce_(0, numbers, semantic[inside], "amax")
        return cls(components.clone(), classes, areas, torch.stack(corners, dim=1))

    def merge(self, into: Tensor) -> None:
        """Make components parts of others.

        Args:
            into: (N,) int64, the component that each becomes a part of: itself, or one that
                stays itself.
        """
        # The last entry is for pixels of no component, numbered -1.
        self.map = torch.cat([into, into.new_tensor([-1])])[self.map]
        self.areas = torch.zeros_like(self.areas).scatter_add_(0, into, self.areas)
        corners_into = into[:, None].expand(-1, 2)
        low, high = self.boxes.split(2, dim=1)
        low = low.scatter_reduce(0, corners_into, low, "amin")
        high = high.scatter_reduce(0, corners_into, high, "amax")
        self.boxes = torch.cat([low, high], dim=1)


def large_components(components: Components, settings: MergeSettings) -> Tensor:
    """(M,) int64 numbers of the components that may be merged, ascending."""
    largest = components.areas.argsort(descending=True, stable=True)[: settings.max_components]
    is_large = components.areas[largest] >= max(settings.min_area, 1)
    return largest[is_large].sort().values


def candidate_pairs(components: Components, large: Tensor, settings: MergeSettings) -> Tensor:
    """(P, 2) int64 pairs of ``large`` that might be one instance, the larger one first."""
    boxes, classes = components.boxes[large], components.classes[large]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    gaps = (low - high).clamp(min=0).amax(dim=2)
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
    is_near = gaps <= settings.max_gap * torch.maximum(sides[:, None], sides)
    is_near &= classes[:, None] == classes
    is_near.fill_diagonal_(False)
    gaps = gaps.masked_fill(~is_near, torch.inf)
    order = gaps.argsort(dim=1, stable=True)[:, : settings.partners]
    rows = torch.arange(len(large), device=order.device)[:, None].expand_as(order)
    chosen = gaps.gather(1, order).isfinite()
    pairs = torch.stack([rows[chosen], order[chosen]], dim=1).sort(dim=1).values.unique(dim=0)
    areas = components.areas[large][pairs]
    pairs = torch.where((areas[:, 0] >= areas[:, 1])[:, None], pairs, pairs.flip(1))
    return large[pairs]


def windows(components: Components, pairs: Tensor, *, jitter: bool = False) -> Tensor:
    """(P, 4) corners of a square around both components of each pair, with a margin.

    ``jitter`` randomly moves and scales each by up to 10 per cent.
    """
    boxes = components.boxes[pairs]
    low, high = boxes[:, :, :2].amin(dim=1), boxes[:, :, 2:].amax(dim=1)
    centres = (low + high) / 2
    sides = (high - low).amax(dim=1, keepdim=True) * (1 + 2 * _MARGIN)
    if jitter:
        moves = (torch.rand(len(pairs), 3, device=boxes.device) * 2 - 1) * _JITTER
        centres = centres + moves[:, :2] * sides
        sides = sides * (1 + moves[:, 2:])
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def crop_pairs(
    maps: Tensor, semantic: Tensor, components: Components, pairs: Tensor, boxes: Tensor
) -> Tensor:
    """MergerNet's input for each pair.

    Args:
        maps: (6, H, W) image (3), probabilities of the class, of a horizontal breakpoint and of a
            vertical one.
        semantic: (H, W) int64, class + 1, 0 for background.
        components: of the image.
        pairs: (P, 2) their numbers.
        boxes: (P, 4) corners of the crops in pixels; crops are 0 outside the image.
    Returns:
        (P, 10, 64, 64): the image (3), the first component, the second, others of their class,
        pixels of other classes, then the rest of ``maps``.
    """
    if not len(pairs):
        return maps.new_zeros(0, CROP_CHANNELS, CROP_SIZE, CROP_SIZE)
    soft = roi_align(maps[None], [boxes], CROP_SIZE, sampling_ratio=1, aligned=True)
    steps = (torch.arange(CROP_SIZE, device=boxes.device) + 0.5) / CROP_SIZE
    positions = boxes[:, None, :2] + steps[:, None] * (boxes[:, None, 2:] - boxes[:, None, :2])
    x, y = positions.floor().long().unbind(dim=2)
    height, width = semantic.shape
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x, y = x.clamp(0, width - 1)[:, None, :], y.clamp(0, height - 1)[:, :, None]
    owners = torch.where(inside, components.map[y, x], -1)
    kinds = torch.where(inside, semantic[y, x], 0)
    kind = components.classes[pairs[:, 0], None, None]
    first, second = (owners == pairs[:, i, None, None] for i in (0, 1))
    others = (owners >= 0) & (kinds == kind) & ~first & ~second
    masks = torch.stack([first, second, others, (kinds > 0) & (kinds != kind)], dim=1)
    return torch.cat([soft[:, :3], masks.to(soft.dtype), soft[:, 3:]], dim=1)


def merge_greedily(
    components: Components, settings: MergeSettings, score: Callable[[Tensor], Tensor]
) -> None:
    """Merge the likeliest pairs until no pair is likely; score merged components anew.

    Each round merges every pair that is the likeliest of both its components; the likeliest pair of
    all is one of them.  So rounds are few and ``score`` gets many pairs at once.

    Args:
        components: changed in place.
        settings: candidates and threshold.
        score: pairs (P, 2) → (P,) probabilities, for the current ``components``.
    """
    large = large_components(components, settings)
    pairs = candidate_pairs(components, large, settings)
    scores = score(pairs)
    count = len(components.areas)
    while (likely := scores > settings.threshold).any():
        merged = likeliest_of_both(pairs[likely], scores[likely], count)
        into = torch.arange(count, device=pairs.device)
        into[merged[:, 1]] = merged[:, 0]
        components.merge(into)
        touched = torch.zeros(count, dtype=torch.bool, device=pairs.device)
        touched[merged.flatten()] = True
        untouched = ~touched[pairs].any(dim=1)
        large = large[components.areas[large] > 0]
        new_pairs = candidate_pairs(components, large, settings)
        new_pairs = new_pairs[touched[new_pairs].any(dim=1)]
        pairs, scores = (
            torch.cat([pairs[untouched], new_pairs]),
            torch.cat([scores[untouched], score(new_pairs)]),
        )


def likeliest_of_both(pairs: Tensor, scores: Tensor, count: int) -> Tensor:
    """(M, 2) pairs that are the likeliest of both their components; no component is in two.

    Args:
        pairs: (P, 2) of ``count`` components.
        scores: (P,); of equal ones the first counts as the likelier.
    """
    pairs = pairs[scores.argsort(descending=True, stable=True)]
    ranks = torch.arange(len(pairs), device=pairs.device)
    best = ranks.new_full((count,), len(pairs))
    best.scatter_reduce_(0, pairs.flatten(), ranks.repeat_interleave(2), "amin")
    return pairs[(best[pairs] == ranks[:, None]).all(dim=1)]


def merge_by_owner(components: Components, owners: Tensor) -> None:
    """Merge the components of each instance, in place.

    Args:
        components: of an image.
        owners: (N,) the instance of each component, -1 for none.
    """
    numbers = torch.arange(len(owners), device=owners.device)
    owned = owners >= 0
    first = numbers.new_full((int(owners.max()) + 1 if len(owners) else 0,), len(owners))
    first.scatter_reduce_(0, owners[owned], numbers[owned], "amin")
    into = numbers.clone()
    into[owned] = first[owners[owned]]
    components.merge(into)
