"""How a large image is divided into overlapping tiles of one size."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from instseg.errors import ConfigError


class Rect(NamedTuple):
    """Pixels ``[x0, x1) x [y0, y1)`` of an image."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def filled(self) -> bool:
        """Whether it has a pixel."""
        return self.x0 < self.x1 and self.y0 < self.y1

    def intersection(self, other: "Rect") -> "Rect":
        """What both cover; not ``filled`` if they share no pixel."""
        return Rect(
            max(self.x0, other.x0),
            max(self.y0, other.y0),
            min(self.x1, other.x1),
            min(self.y1, other.y1),
        )

    def contains(self, other: "Rect") -> bool:
        """Whether ``other`` has no pixel outside."""
        return self.intersection(other) == other


_MOST_TILES = 2**20
"""A slide of 10^6 x 10^6 pixels has fewer tiles of 1024."""


@dataclass(frozen=True)
class Layout:
    """Tiles of one size that cover an image, row by row.

    Neighbours share ``overlap`` pixels or more: the last tile of a row or column is moved inwards
    to end with the image.  A side of the image that is shorter than ``tile`` is not divided, so an
    image that fits into a tile is one tile of its own size.

    Attributes:
        height, width: of the image in pixels.
        tile: side of a tile in pixels.
        overlap: pixels that neighbours share at least.
    """

    height: int
    width: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        check_tile(self.tile, self.overlap)
        count = len(self.rows) * len(self.columns)
        if count > _MOST_TILES:
            raise ConfigError(
                f"an image of {self.width}x{self.height} pixels has {count} tiles of {self.tile} "
                f"pixels with overlap {self.overlap}; expected at most {_MOST_TILES}: choose "
                "larger tiles or less overlap"
            )

    def __len__(self) -> int:
        return len(self.rects)

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """(R, 2) first row of pixels of each row of tiles, and the one behind its last."""
        return _intervals(self.height, self.tile, self.overlap)

    @cached_property
    def columns(self) -> npt.NDArray[np.int64]:
        """(C, 2) the same of columns."""
        return _intervals(self.width, self.tile, self.overlap)

    @cached_property
    def rects(self) -> list[Rect]:
        """The tiles in the order in which they are predicted."""
        return [
            Rect(x0, y0, x1, y1)
            for y0, y1 in self.rows.tolist()
            for x0, x1 in self.columns.tolist()
        ]

    def last_tile(self, box: Rect) -> int:
        """Number of the last tile that has a pixel of ``box``."""
        row = int(np.flatnonzero(self.rows[:, 0] < box.y1)[-1])
        column = int(np.flatnonzero(self.columns[:, 0] < box.x1)[-1])
        return row * len(self.columns) + column

    def is_shared(self, box: Rect) -> bool:
        """Whether two tiles or more have a pixel of ``box``."""
        counts = [
            int(((ends[:, 0] < high) & (ends[:, 1] > low)).sum())
            for ends, low, high in ((self.rows, box.y0, box.y1), (self.columns, box.x0, box.x1))
        ]
        return counts[0] * counts[1] > 1

    def is_complete(self, box: Rect, tile: int, margin: int) -> bool:
        """Whether ``box`` lies in a tile, ``margin`` pixels or more from its inner edges.

        An inner edge has further pixels of the image behind it; the edges of the image are none.
        """
        row, column = divmod(tile, len(self.columns))
        return bool(
            _inside(self.rows[row : row + 1], self.height, box.y0, box.y1, margin).all()
            and _inside(self.columns[column : column + 1], self.width, box.x0, box.x1, margin).all()
        )

    def is_complete_somewhere(self, box: Rect, margin: int) -> bool:
        """Whether :meth:`is_complete` holds for any tile."""
        return bool(
            _inside(self.rows, self.height, box.y0, box.y1, margin).any()
            and _inside(self.columns, self.width, box.x0, box.x1, margin).any()
        )

    def clearance(self, box: Rect, tile: int) -> float:
        """Sum over both axes of the distance from the centre of ``box`` to the next inner edge.

        Between two neighbours the middle of their overlap is as far from the inner edge of one as
        from that of the other: beyond it the neighbour's clearance is the larger one.  The tile
        with the largest clearance for a point therefore has it in its core, the part of the tile
        between these middles.
        """
        row, column = divmod(tile, len(self.columns))
        return _distance(self.rows[row], self.height, box.y0, box.y1) + _distance(
            self.columns[column], self.width, box.x0, box.x1
        )


def check_tile(tile: int, overlap: int) -> None:
    """
    Raises:
        ConfigError: no tile has this side, or neighbours cannot share so many pixels.
    """
    if tile < 1:
        raise ConfigError(f"tile is {tile}; expected the side of a tile in pixels, such as 1024")
    if not 0 <= overlap < tile:
        raise ConfigError(
            f"overlap is {overlap} with tiles of {tile} pixels; expected 0 to {tile - 1}"
        )


def _intervals(length: int, tile: int, overlap: int) -> npt.NDArray[np.int64]:
    """(N, 2) begin and end of the tiles along an axis."""
    side = min(tile, length)
    starts = [*range(0, length - side, tile - overlap), length - side]
    return np.array([(start, start + side) for start in starts], dtype=np.int64)


def _inside(
    intervals: npt.NDArray[np.int64], length: int, low: int, high: int, margin: int
) -> npt.NDArray[np.bool_]:
    """(N,) whether ``[low, high)`` lies in an interval and clear of its inner ends."""
    begins, ends = intervals[:, 0], intervals[:, 1]
    first = np.where(begins > 0, begins + margin, 0)
    last = np.where(ends < length, ends - margin, length)
    inside: npt.NDArray[np.bool_] = (first <= low) & (high <= last)
    return inside


def _distance(interval: npt.NDArray[np.int64], length: int, low: int, high: int) -> float:
    """From the middle of ``[low, high)`` to the next inner end; the side of a tile without any."""
    begin, end = interval.tolist()
    middle = (low + high) / 2
    distances = [end - begin]
    if begin > 0:
        distances.append(middle - begin)
    if end < length:
        distances.append(end - middle)
    return float(min(distances))
