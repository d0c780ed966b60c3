"""Maps of one image, predicted or true, and the components made from them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import DenseTargets
from instseg.projects.sgn.lines import line_components, links_from_breakpoints
from instseg.projects.sgn.targets import breakpoint_labels, link_targets


@dataclass(frozen=True)
class LineSettings:
    """How lines are cut and joined; see the keys of the same names.

    Attributes:
        widening: pixels by which breakpoints are wider than one.
        breakpoint_threshold: least probability of a breakpoint.
        link_threshold: least mean link of lines that are joined.
        direction: "rows" or "columns".
    """

    widening: int
    breakpoint_threshold: float
    link_threshold: float
    direction: str


@dataclass(frozen=True)
class ImageMaps:
    """Output of the first two networks for one image, or the ground truth.

    Attributes:
        image: (3, h, w) normalised, of the size of the maps.
        semantic: (h, w) int64, class + 1, or 1 for all classes, 0 for background.
        confidence: (h, w) probability of that class.
        breakpoints: (2, 4, h, w) probabilities of labels along rows and columns.
        breakpoint_probability: (2, h, w) of the network, even where ``breakpoints`` are the ground
            truth, because MergerNet was trained on it.
        links: (2, h, w) probability that a pixel and the one below, to the right, belong together.
    """

    image: Tensor
    semantic: Tensor
    confidence: Tensor
    breakpoints: Tensor
    breakpoint_probability: Tensor
    links: Tensor

    def for_crops(self) -> Tensor:
        """(6, h, w) maps of :func:`crop_pairs`."""
        return torch.cat([self.image, self.confidence[None], self.breakpoint_probability])


@dataclass(frozen=True)
class GroundTruth:
    """Ground truth of one image, from its annotations, with shapes as in :class:`ImageMaps`.

    Attributes:
        owners: (h, w) int64, the instance at each pixel, -1 for none.
        semantic: (h, w) int64, class + 1, or 1 for all classes, 0 for background.
        labels: (2, h, w) uint8 breakpoints.
        links: (2, h, w) bool.
    """

    owners: Tensor
    semantic: Tensor
    labels: Tensor
    links: Tensor

    @classmethod
    def of_image(
        cls, targets: DenseTargets, number: int, size: tuple[int, int], widening: int
    ) -> "GroundTruth":
        """Image ``number``, of ``size`` cells, from the targets of a batch."""
        rows, columns = size
        owners = targets.owners[number, :rows, :columns]
        semantic = targets.semantic[number, :rows, :columns]
        same, _ = link_targets(owners[None], semantic[None])
        return cls(owners, semantic, torch.stack(breakpoint_labels(owners, widening)), same[0])

    def breakpoints(self) -> Tensor:
        """(2, 4, h, w) probabilities 0 and 1."""
        return one_hot(self.labels, 4)


def one_hot(labels: Tensor, count: int) -> Tensor:
    """(N, h, w) labels → (N, count, h, w) float32 probabilities 0 and 1."""
    return F.one_hot(labels.long(), count).movedim(-1, 1).float()


def find_components(
    labels: Tensor, semantic: Tensor, links: Tensor, settings: LineSettings
) -> tuple[Tensor, Tensor]:
    """Lines and components of an image, see :func:`line_components`.

    Args:
        labels: (2, h, w) uint8 breakpoints.
        semantic: (h, w) int64.
        links: (2, h, w) probabilities.
    """
    rows = settings.direction == "rows"
    maps = (labels[0], semantic, links[0]) if rows else (labels[1].mT, semantic.mT, links[1].mT)
    lines, components = line_components(
        maps[0],
        maps[1],
        maps[2].float(),
        widened=settings.widening > 0,
        threshold=settings.link_threshold,
    )
    return (lines, components) if rows else (lines.mT, components.mT)


def breakpoint_links(labels: Tensor, settings: LineSettings) -> Tensor:
    """(2, h, w) links without LineNet, from breakpoints (2, h, w)."""
    widened = settings.widening > 0
    below = links_from_breakpoints(labels[1], widened=widened)
    right = links_from_breakpoints(labels[0].mT, widened=widened).mT
    return torch.stack([below, right])


def foreground(probabilities: Tensor) -> Tensor:
    """(..., C + 1, h, w) probabilities → (..., 2, h, w) of background and of any class."""
    background = probabilities.narrow(-3, 0, 1)
    return torch.cat([background, 1 - background], dim=-3)
