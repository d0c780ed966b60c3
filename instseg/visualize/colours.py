"""Colours of instances, which differ between neighbours or follow tracks."""

import numpy as np
import numpy.typing as npt

from instseg.tracking import UNTRACKED

Colours = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.float64]

PALETTE: Colours = np.array(
    [
        (75, 75, 255),  # red
        (255, 212, 0),  # cyan
        (0, 213, 255),  # yellow
        (255, 125, 199),  # violet
        (85, 220, 61),  # green
        (26, 140, 255),  # orange
        (196, 95, 255),  # pink
        (255, 140, 63),  # blue
        (0, 240, 182),  # lime
        (160, 201, 0),  # teal
    ],
    dtype=np.uint8,
)
"""(10, 3) BGR, bright enough for black text."""
GREY = np.array((150, 150, 150), dtype=np.uint8)
"""Colour of instances that belong to no track."""


def track_colours(track_ids: npt.NDArray[np.int64]) -> Colours:
    """(N, 3) colours of tracks, the same in every frame; grey for instances without one."""
    return np.where((track_ids == UNTRACKED)[:, None], GREY, PALETTE[track_ids % len(PALETTE)])


def neighbour_colours(boxes: Boxes) -> Colours:
    """(N, 3) colours that differ between neighbours, the same for the same boxes.

    Larger boxes come first, and each gets a colour that none of its neighbours has so far, or that
    the fewest have.  Boxes are neighbours if the gap between them is at most half of the median of
    their longer sides.

    Args:
        boxes: (N, 4) xyxy.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    neighbours = _neighbours(boxes, float(np.median(sides.max(axis=1))) / 2)
    areas = sides.prod(axis=1)
    chosen = np.full(len(boxes), -1)
    palette = np.arange(len(PALETTE))
    for rank, index in enumerate(np.argsort(-areas, kind="stable")):
        neighbour_numbers = chosen[neighbours[index]]
        uses = np.bincount(neighbour_numbers[neighbour_numbers >= 0], minlength=len(palette))
        order = np.roll(palette, -rank)
        chosen[index] = order[uses[order].argmin()]
    return PALETTE[chosen]


def _neighbours(boxes: Boxes, margin: float) -> list[list[int]]:
    """The neighbours of each box; a sweep from the left, as N x N pairs can be too many."""
    neighbours: list[list[int]] = [[] for _ in boxes]
    order = np.argsort(boxes[:, 0], kind="stable")
    x1, y1, x2, y2 = boxes[order].T
    stops = np.searchsorted(x1, x2 + margin, side="right")
    for rank, stop in enumerate(stops):
        others = slice(rank + 1, stop)
        is_near = (y1[others] <= y2[rank] + margin) & (y2[others] >= y1[rank] - margin)
        for other in order[others][is_near].tolist():
            neighbours[order[rank]].append(other)
            neighbours[other].append(int(order[rank]))
    return neighbours
