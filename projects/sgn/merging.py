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
    """Which pairs of components are looked at, and when they are merged.

    Attributes:
        min_area: pixels that a component of a pair has at least.
        max_gap: between the boxes of a pair, as a share of the longest of their sides.
        partners: the nearest so many are looked at, for each component.
        threshold: pairs with a probability above it are merged.
    """

    min_area: int = 50
    max_gap: float = 0.5
    partners: int = 10
    threshold: float = 0.5


@dataclass
class Components:
    """Components of one picture.

    Attributes:
        map: (H, W) int64, 0 ... N - 1, -1 for none.
        classes: (N,) int64, class + 1.
        areas: (N,) pixels; 0 for one that was merged into another.
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

    def merge(self, kept: int, gone: int) -> None:
        """Make ``gone`` a part of ``kept``."""
        self.map[self.map == gone] = kept
        self.areas[kept] += self.areas[gone]
        self.areas[gone] = 0
        low = torch.minimum(self.boxes[kept, :2], self.boxes[gone, :2])
        high = torch.maximum(self.boxes[kept, 2:], self.boxes[gone, 2:])
        self.boxes[kept] = torch.cat([low, high])


def candidate_pairs(components: Components, settings: MergeSettings) -> Tensor:
    """(P, 2) int64 pairs that might be one object, the larger of the two first."""
    large = (components.areas >= max(settings.min_area, 1)).nonzero()[:, 0]
    boxes, classes = components.boxes[large], components.classes[large]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    gaps = (low - high).clamp(min=0).amax(dim=2)
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
    near = gaps <= settings.max_gap * torch.maximum(sides[:, None], sides)
    near &= classes[:, None] == classes
    near.fill_diagonal_(False)
    gaps = gaps.masked_fill(~near, torch.inf)
    order = gaps.argsort(dim=1, stable=True)[:, : settings.partners]
    rows = torch.arange(len(large), device=order.device)[:, None].expand_as(order)
    chosen = gaps.gather(1, order).isfinite()
    pairs = torch.stack([rows[chosen], order[chosen]], dim=1).sort(dim=1).values.unique(dim=0)
    areas = components.areas[large][pairs]
    pairs = torch.where((areas[:, 0] >= areas[:, 1])[:, None], pairs, pairs.flip(1))
    return large[pairs]


def windows(components: Components, pairs: Tensor, *, jitter: bool = False) -> Tensor:
    """(P, 4) corners of a square around both components of each pair, with a margin.

    ``jitter`` moves and scales each by up to 10 per cent at random.
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
    """What MergerNet sees of each pair.

    Args:
        maps: (6, H, W) picture, probability of the class, of a horizontal and of a vertical
            breakpoint.
        semantic: (H, W) int64, class + 1, 0 for background.
        components: of the picture.
        pairs: (P, 2) their numbers.
        boxes: (P, 4) corners of the crops in pixels; what lies outside of the picture is 0.
    Returns:
        (P, 10, 64, 64): the picture (3), the first component, the second, others of their class,
        pixels of other classes, then the rest of ``maps``.
    """
    if not len(pairs):
        return maps.new_zeros(0, CROP_CHANNELS, CROP_SIZE, CROP_SIZE)
    soft = roi_align(maps[None], [boxes], CROP_SIZE, sampling_ratio=1, aligned=True)
    steps = (torch.arange(CROP_SIZE, device=boxes.device) + 0.5) / CROP_SIZE
    places = boxes[:, None, :2] + steps[:, None] * (boxes[:, None, 2:] - boxes[:, None, :2])
    x, y = places.floor().long().unbind(dim=2)
    height, width = semantic.shape
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x, y = x.clamp(0, width - 1)[:, None, :], y.clamp(0, height - 1)[:, :, None]
    owners = torch.where(inside, components.map[y, x], -1)
    kinds = torch.where(inside, semantic[y, x], 0)
    own_kind = components.classes[pairs[:, 0], None, None]
    first, second = (owners == pairs[:, i, None, None] for i in (0, 1))
    others = (owners >= 0) & (kinds == own_kind) & ~first & ~second
    masks = torch.stack([first, second, others, (kinds > 0) & (kinds != own_kind)], dim=1)
    return torch.cat([soft[:, :3], masks.to(soft.dtype), soft[:, 3:]], dim=1)


def merge_greedily(
    components: Components, settings: MergeSettings, score: Callable[[Tensor], Tensor]
) -> None:
    """Merge the likeliest pair until no pair is likely, looking at merged components anew.

    Args:
        components: changed in place.
        settings: which pairs, and how likely.
        score: pairs (P, 2) → (P,) probabilities, for ``components`` as they are when it is called.
    """
    pairs = candidate_pairs(components, settings)
    scores = score(pairs)
    while len(pairs) and scores.max() > settings.threshold:
        kept, gone = pairs[scores.argmax()].tolist()
        components.merge(kept, gone)
        untouched = ((pairs != kept) & (pairs != gone)).all(dim=1)
        new = candidate_pairs(components, settings)
        new = new[(new == kept).any(dim=1)]
        pairs, scores = (
            torch.cat([pairs[untouched], new]),
            torch.cat([scores[untouched], score(new)]),
        )


def merge_by_owner(components: Components, owners: Tensor) -> None:
    """Merge the components of each object, in place.

    Args:
        components: of a picture.
        owners: (N,) the object of each component, -1 for none.
    """
    first: dict[int, int] = {}
    for number, owner in enumerate(owners.tolist()):
        kept = first.setdefault(owner, number) if owner >= 0 else number
        if kept != number:
            components.merge(kept, number)
