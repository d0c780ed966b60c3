"""A ground truth that is rendered tile by tile, as a predictor without any error would give it."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from instseg.inference.layout import Layout, Rect
from instseg.inference.stitching import Mask, Piece, Stitched, Stitcher

Instance = tuple[int, int, Mask]
"""x, y of the upper left corner in the image, and the mask of the tight box."""
Change = Callable[[int, int, Instance], Sequence[Instance]]
"""Number of a tile, number of an instance, what is to be seen of it → what the tile finds."""


def exact(tile: int, index: int, instance: Instance) -> Sequence[Instance]:
    return [instance]


def trimmed(x: int, y: int, mask: Mask) -> Instance | None:
    """The same with a tight box; None if no pixel is left."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return x + int(columns[0]), y + int(rows[0]), part


def clipped(instance: Instance, rect: Rect) -> Instance | None:
    """What a rectangle of the image shows of an instance."""
    x, y, mask = instance
    height, width = mask.shape
    part = Rect(x, y, x + width, y + height).intersection(rect)
    if not part.filled:
        return None
    return trimmed(part.x0, part.y0, mask[part.y0 - y : part.y1 - y, part.x0 - x : part.x1 - x])


def moved(instance: Instance, x: int, y: int) -> Instance:
    return instance[0] + x, instance[1] + y, instance[2]


def stitched(
    instances: Sequence[Instance], layout: Layout, change: Change = exact
) -> list[Stitched]:
    """What is left of the instances when each tile has found its part of them."""
    stitcher, number, results = Stitcher(layout), 0, []
    for tile, rect in enumerate(layout.rects):
        pieces = []
        for x, y, mask in parts_found(instances, tile, rect, change):
            box = Rect(x, y, x + mask.shape[1], y + mask.shape[0])
            pieces.append(Piece(number, 0, 0.9, box, mask))
            number += 1
        results += stitcher.add(tile, pieces)
    assert not stitcher.held, "something is held at the end"
    return results


def parts_found(
    instances: Sequence[Instance], tile: int, rect: Rect, change: Change
) -> Iterator[Instance]:
    """What a tile finds: changed first, cut by its edges then."""
    for index, instance in enumerate(instances):
        if clipped(instance, rect) is None:
            continue
        for changed in change(tile, index, instance):
            if (part := clipped(changed, rect)) is not None:
                yield part


def as_set(
    instances: Sequence[Instance | Stitched],
) -> list[tuple[int, int, bytes, tuple[int, ...]]]:
    """Something that is equal for equal instances in any order."""
    plain = [(x.box.x0, x.box.y0, x.mask) if isinstance(x, Stitched) else x for x in instances]
    return sorted((x, y, np.ascontiguousarray(mask).tobytes(), mask.shape) for x, y, mask in plain)


def straight_edges(
    instances: Sequence[Instance | Stitched], layout: Layout, length: int = 6
) -> int:
    """Instances with ``length`` pixels in a row that end at an inner edge of a tile.

    Such an edge is cut: beyond it the instance has none of the pixels that are next to these.
    """
    return sum(
        any(
            _longest_run(edge) >= length
            for edge in _edges_at_seams(
                (x.box.x0, x.box.y0, x.mask) if isinstance(x, Stitched) else x, layout
            )
        )
        for x in instances
    )


def _edges_at_seams(instance: Instance, layout: Layout) -> Iterator[np.ndarray]:
    """For each line of tile edges, which pixels of an instance end at it."""
    x, y, mask = instance
    framed = np.pad(mask, 1)
    for ends, first, axis in ((layout.rows, y, 0), (layout.columns, x, 1)):
        length = framed.shape[axis]
        inner = {int(end) for end in ends.ravel()} - {0, int(ends.max())}
        for line in inner:
            before = line - first  # the pixel before the line, in the frame
            if 0 <= before and before + 1 < length:
                one, other = framed.take(before, axis), framed.take(before + 1, axis)
                yield one & ~other
                yield other & ~one


def _longest_run(line: np.ndarray) -> int:
    longest = current = 0
    for value in line.tolist():
        current = current + 1 if value else 0
        longest = max(longest, current)
    return longest
