"""Exact polygons of masks, along the edges of their pixels."""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Ring = npt.NDArray[np.int64]
"""(N, 2) x and y of corners of pixels, the first one not repeated at the end."""


class Polygon(NamedTuple):
    """A part of a mask: an outer ring and those of its holes.

    No ring meets itself, and rings touch in single points at most, so the polygon is valid in the
    sense of OGC's Simple Features.  (0, 0) is the upper left corner of the image.
    """

    outer: Ring
    holes: list[Ring]

    def area(self) -> int:
        """Number of pixels."""
        return _area(self.outer) + sum(_area(hole) for hole in self.holes)


def polygons(x: int, y: int, crop: npt.NDArray[np.bool_]) -> list[Polygon]:
    """The parts of a mask whose pixels share edges, the largest first.

    Args:
        x, y: corner of the crop in the image.
        crop: (h, w) part of the mask that holds all of it.
    Returns:
        outer rings run counterclockwise where y counts upwards, holes the other way, as RFC 7946
        has them.
    """
    padded = np.pad(crop, 1)
    _, parts, boxes, _ = cv2.connectedComponentsWithStats(padded.view(np.uint8), connectivity=4)
    all_parts = []
    for number, (left, top, width, height, _) in enumerate(boxes[1:].tolist(), start=1):
        part = parts[top : top + height, left : left + width] == number
        corner = np.array((x + left - 1, y + top - 1))
        all_parts.append(_polygon(_rings(np.pad(part, 1)), corner))
    return sorted(all_parts, key=Polygon.area, reverse=True)


def _polygon(rings: list[Ring], corner: Ring) -> Polygon:
    """The polygon with these edges; the longest way around is the outer one."""
    areas = [_area(ring) for ring in rings]
    largest = max(range(len(rings)), key=lambda number: abs(areas[number]))
    turned = [
        (ring if (area > 0) == (number == largest) else ring[::-1]) + corner
        for number, (ring, area) in enumerate(zip(rings, areas, strict=True))
    ]
    return Polygon(turned.pop(largest), turned)


def _rings(part: npt.NDArray[np.bool_]) -> list[Ring]:
    """The edges of pixels that are connected by edges, with background around them.

    Where the pixels meet themselves at a corner, the ring goes around the background, which is
    another one on the other side, so no ring comes to a corner twice.
    """
    northwest, northeast = part[:-1, :-1], part[:-1, 1:]
    southwest, southeast = part[1:, :-1], part[1:, 1:]
    up, down = northwest != northeast, southwest != southeast
    left, right = northwest != southwest, northeast != southeast
    crossing = up & down & left & right
    y, x = np.nonzero(crossing | ((up != down) & (left != right)))
    # At a crossing there are two turns: that with the edge to the left, then the other.
    turns = np.repeat(np.arange(len(x)), 1 + crossing[y, x])
    y, x = y[turns], x[turns]
    is_right = np.diff(turns, prepend=-1) == 0
    goes_down = crossing[y, x] & (is_right != northwest[y, x])
    # Every edge joins two turns, which follow each other in their row or column.
    order = np.lexsort((goes_down, y, x)).reshape(-1, 2)
    vertical = np.empty(len(x), dtype=np.int64)
    vertical[order] = order[:, ::-1]
    next_turns, points = vertical.tolist(), np.stack([x, y], axis=1)
    waiting = dict.fromkeys(range(len(x)))
    rings = []
    while waiting:
        turn = first = next(iter(waiting))
        ring: list[int] = []
        while True:
            across = turn ^ 1  # in rows, turns are numbered in their order
            ring += (turn, across)
            del waiting[turn], waiting[across]
            turn = next_turns[across]
            if turn == first:
                break
        rings.append(points[ring])
    return rings


def _area(ring: Ring) -> int:
    """Area inside a ring, negative if it runs clockwise where y counts upwards."""
    x, y = ring.T
    return int(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) // 2
