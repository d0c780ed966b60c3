"""Join the instances of overlapping tiles into those of the image, each one once.

The rule is that of StarDist (Weigert et al., WACV 2020, prediction of large images): an instance is
given by the one tile that is responsible for it.  Tiles overlap by an instance and the context that
a network needs, so one tile sees it whole, in its core.  Predictions of two tiles can differ in
three ways, which give three steps:

1. A piece that its tile cuts at an inner edge is left out if another tile sees all of it and what
   continues it: that tile is responsible, also if it found nothing.
2. Pieces of two tiles that cover the same pixels of what both tiles see are versions of one
   instance.  The version of the tile with the largest :meth:`Layout.clearance` stands for all, so
   there is no gap and no double where two tiles see an instance a pixel apart.  If no tile sees all
   of it, because it is larger than the overlap, the versions are its pieces and are joined.
3. If an instance of one tile contains an instance of another, such as a nucleus and a part of it,
   one of the two is left out: the part, if its tile cannot see the whole, else the one with the
   smaller clearance.  Both stay if one tile sees both that way: instances may be nested.

An instance that its responsible tile misses and a neighbour sees whole stays.  Instances of two
classes are never compared, nor are those of one tile, which the model itself has told apart.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from instseg.inference.layout import Layout, Rect

Mask = npt.NDArray[np.bool_]

EDGE = 2
"""A mask that ends within so many pixels of an inner edge is cut by that edge.

Masks that are drawn from a grid of cells end a pixel or two before the edge that cuts them.  Two
tiles see an instance up to as many pixels apart.  A cut piece is therefore left to another tile
only if it keeps twice this distance there, so that not both tiles take an instance for cut.
"""
SAME_IOU = 0.4
"""Least IoU, on the pixels that both tiles see, of two versions of an instance.

An instance of 8 x 8 pixels that is seen two pixels apart in both directions has 0.39; different
instances of a class hardly overlap as much.  Each piece has one version in another tile at most,
that with the largest IoU.
"""
CONTAINED = 0.6
"""An instance contains a smaller one if it covers this share of the smaller one's pixels.

Half of an instance that was cut in two may belong to either neighbour; beyond that, less than half
is its own.
"""


@dataclass(eq=False)
class Piece:
    """What a tile found, in pixels of the image.

    Attributes:
        number: of the piece, in the order in which pieces are found.
        kind: class.
        score: of its class.
        box: the smallest one around the mask.
        mask: (h, w) bool, of the box.
    """

    number: int
    kind: int
    score: float
    box: Rect
    mask: Mask

    @cached_property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))

    def within(self, rect: Rect) -> Mask:
        """The mask on ``rect``, which lies in its box."""
        x, y = self.box.x0, self.box.y0
        return self.mask[rect.y0 - y : rect.y1 - y, rect.x0 - x : rect.x1 - x]


@dataclass(eq=False)
class Stitched(Piece):
    """An instance of the image.

    Attributes:
        number, kind, score: those of its piece; of several pieces, of that with most pixels.
        joined: whether it is made of several pieces.
    """

    joined: bool = False


@dataclass(eq=False)
class _Candidate:
    """A piece that another tile may see as well.

    Attributes:
        tile: that found it.
        complete: whether the tile sees all of it.
        clearance: of the tile for it.
        last_tile: number of the last tile that has one of its pixels.
        versions: by other tiles, at most one of each.
        rivals: of other tiles, of which one contains the other.
    """

    piece: Piece
    tile: int
    complete: bool
    clearance: float
    last_tile: int
    versions: "dict[int, _Candidate]" = field(default_factory=dict)
    rivals: "set[_Candidate]" = field(default_factory=set)

    @property
    def rank(self) -> tuple[float, float, int]:
        """The first by rank is the most reliable one."""
        return -self.clearance, -self.piece.score, self.piece.number


_Version = tuple[Stitched, _Candidate, list[_Candidate]]
"""An instance, the candidate that gives its rank, and all candidates that are versions of it."""


class Stitcher:
    """Takes the instances of one tile after the other and gives those of the image.

    Only instances are held that a tile to come may see as well, and those related to them.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._held: list[_Candidate] = []

    @property
    def held(self) -> int:
        """Number of pieces that wait for tiles to come."""
        return len(self._held)

    def add(self, tile: int, pieces: Iterable[Piece]) -> Iterator[Stitched]:
        """Take what a tile found, and give the instances that no tile to come can change.

        Args:
            tile: its number; all tiles have to be added in their order, also those without pieces.
            pieces: their masks are not empty.
        """
        candidates = []
        for piece in pieces:
            if self.layout.is_shared(piece.box):
                candidates += self._candidates(piece, tile)
            else:
                yield _stitched(piece)
        self._relate(candidates)
        self._held += candidates
        held: list[_Candidate] = []
        for component in _connected(self._held, _related):
            if max(candidate.last_tile for candidate in component) > tile:
                held += component
            else:
                yield from self._resolve(component)
        self._held = held

    def _candidates(self, piece: Piece, tile: int) -> list[_Candidate]:
        """``piece`` as a candidate; none if another tile is responsible for it."""
        complete = self.layout.is_complete(piece.box, tile, EDGE)
        if not complete and self.layout.is_complete_somewhere(piece.box, 2 * EDGE):
            return []
        clearance = self.layout.clearance(piece.box, tile)
        return [_Candidate(piece, tile, complete, clearance, self.layout.last_tile(piece.box))]

    def _relate(self, candidates: Sequence[_Candidate]) -> None:
        """Find versions and rivals of the candidates of a tile among those of other tiles."""
        similar: list[tuple[float, _Candidate, _Candidate]] = []
        for one, other in _meeting(candidates, self._held):
            common = shared_pixels(one.piece, other.piece)
            if _contained(one.piece, other.piece, common):
                one.rivals.add(other)
                other.rivals.add(one)
            iou = self._iou(one, other, common)
            if iou >= SAME_IOU:
                similar.append((iou, one, other))
        similar.sort(key=lambda pair: (-pair[0], pair[1].piece.number, pair[2].piece.number))
        for _, one, other in similar:
            if other.tile not in one.versions and one.tile not in other.versions:
                one.versions[other.tile] = other
                other.versions[one.tile] = one

    def _iou(self, one: _Candidate, other: _Candidate, common: int) -> float:
        """IoU on the pixels that both tiles have, of which both masks have ``common``."""
        area = 0
        for candidate, neighbour in ((one, other), (other, one)):
            part = candidate.piece.box.intersection(self.layout.rects[neighbour.tile])
            area += int(np.count_nonzero(candidate.piece.within(part))) if part.filled else 0
        return common / (area - common) if common else 0.0

    def _resolve(self, component: Sequence[_Candidate]) -> Iterator[Stitched]:
        """The instances that related candidates stand for."""
        groups = _connected(component, lambda candidate: candidate.versions.values())
        versions = [self._version(group) for group in groups]
        wholes = [x for x in versions if not any(self._is_part(x, other) for other in versions)]
        kept: list[_Version] = []
        for version in sorted(wholes, key=lambda version: version[1].rank):
            if not any(_is_double(version, other) for other in kept):
                kept.append(version)
        for candidate in component:  # which refer to each other
            candidate.versions.clear()
            candidate.rivals.clear()
        yield from (version[0] for version in kept)

    def _is_part(self, version: _Version, other: _Version) -> bool:
        """Whether it is the part that its tile sees of a larger instance."""
        tile_rect = self.layout.rects[version[1].tile]
        larger = version[0].area < other[0].area and not tile_rect.contains(other[0].box)
        return larger and _is_double(version, other)

    def _version(self, group: list[_Candidate]) -> _Version:
        """The version that stands for all, or all of them joined."""
        group.sort(key=lambda candidate: candidate.rank)
        for candidate in group:
            sees_all = all(self.layout.rects[candidate.tile].contains(x.piece.box) for x in group)
            if len(group) == 1 or (candidate.complete and sees_all):
                return _stitched(candidate.piece), candidate, group
        corners = np.array([candidate.piece.box for candidate in group])
        box = Rect(*corners[:, :2].min(axis=0).tolist(), *corners[:, 2:].max(axis=0).tolist())
        mask = np.zeros((box.y1 - box.y0, box.x1 - box.x0), dtype=bool)
        largest = max(group, key=lambda candidate: candidate.piece.area)
        whole = Stitched(
            largest.piece.number, largest.piece.kind, largest.piece.score, box, mask, joined=True
        )
        for candidate in group:
            whole.within(candidate.piece.box)[:] |= candidate.piece.mask
        return whole, largest, group


def shared_pixels(one: Piece, other: Piece) -> int:
    """Number of pixels that two masks have in common."""
    common = one.box.intersection(other.box)
    if not common.filled:
        return 0
    return int(np.count_nonzero(one.within(common) & other.within(common)))


def _contained(one: Piece, other: Piece, common: int) -> bool:
    """Whether one of two masks with ``common`` pixels in common contains the other."""
    return common > 0 and common >= CONTAINED * min(one.area, other.area)


def _stitched(piece: Piece) -> Stitched:
    return Stitched(piece.number, piece.kind, piece.score, piece.box, piece.mask)


def _meeting(
    ones: Sequence[_Candidate], others: Sequence[_Candidate]
) -> Iterator[tuple[_Candidate, _Candidate]]:
    """Pairs of one class whose boxes overlap."""
    if not ones or not others:
        return
    a, b = (np.array([(*c.piece.box, c.piece.kind) for c in group]) for group in (ones, others))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:4], b[None, :, 2:4])
    meet = (low < high).all(axis=2) & (a[:, None, 4] == b[None, :, 4])
    for row, column in np.argwhere(meet).tolist():
        yield ones[row], others[column]


def _related(candidate: _Candidate) -> list[_Candidate]:
    return [*candidate.versions.values(), *candidate.rivals]


def _connected(
    candidates: Iterable[_Candidate], neighbours: Callable[[_Candidate], Iterable[_Candidate]]
) -> Iterator[list[_Candidate]]:
    """Those that are neighbours, directly or through others, in the order of their numbers."""
    left = dict.fromkeys(candidates)
    while left:
        waiting = [next(iter(left))]
        del left[waiting[0]]
        component = []
        while waiting:
            component.append(waiting.pop())
            for other in neighbours(component[-1]):
                if other in left:
                    del left[other]
                    waiting.append(other)
        yield sorted(component, key=lambda candidate: candidate.piece.number)


def _is_double(version: _Version, other: _Version) -> bool:
    """Whether one instance contains the other, and no tile sees both like that."""

    def contained(one: Piece, two: Piece) -> bool:
        return _contained(one, two, shared_pixels(one, two))

    return contained(version[0], other[0]) and not any(
        one.tile == two.tile and contained(one.piece, two.piece)
        for one in version[2]
        for two in other[2]
    )
