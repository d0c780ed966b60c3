"""Tiles cover an image, and every point has one tile that sees it best."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instseg.errors import ConfigError
from instseg.inference.layout import Layout, Rect

LENGTHS = st.integers(1, 90)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tile = draw(st.integers(1, 40))
    return Layout(draw(LENGTHS), draw(LENGTHS), tile, draw(st.integers(0, tile - 1)))


def test_the_last_tile_is_moved_inwards() -> None:
    layout = Layout(100, 60, 40, 10)
    assert layout.rows.tolist() == [[0, 40], [30, 70], [60, 100]]
    assert layout.columns.tolist() == [[0, 40], [20, 60]]
    assert len(layout) == 6
    assert layout.rects[3] == Rect(20, 30, 60, 70)


def test_a_side_shorter_than_a_tile_is_not_divided() -> None:
    assert Layout(30, 40, 40, 10).rects == [Rect(0, 0, 40, 30)]
    assert Layout(30, 50, 40, 10).rects == [Rect(0, 0, 40, 30), Rect(10, 0, 50, 30)]


@given(layouts())
def test_tiles_of_one_size_cover_every_pixel_and_overlap_enough(layout: Layout) -> None:
    covered = np.zeros((layout.height, layout.width), bool)
    for rect in layout.rects:
        assert (rect.x1 - rect.x0, rect.y1 - rect.y0) == (
            min(layout.tile, layout.width),
            min(layout.tile, layout.height),
        )
        covered[rect.y0 : rect.y1, rect.x0 : rect.x1] = True
    assert covered.all()
    for intervals in (layout.rows, layout.columns):
        assert (intervals[:-1, 1] - intervals[1:, 0] >= layout.overlap).all()
        assert (np.diff(intervals[:, 0]) > 0).all()


@given(layouts(), st.data())
def test_what_fits_into_the_overlap_is_complete_in_the_tile_of_largest_clearance(
    layout: Layout, data: st.DataObject
) -> None:
    """The rule of responsibility: with an overlap of an instance and a context on both sides."""
    context = data.draw(st.integers(0, layout.overlap // 2))
    width, height = (
        data.draw(st.integers(1, max(1, min(layout.overlap - 2 * context, length))))
        for length in (layout.width, layout.height)
    )
    x = data.draw(st.integers(0, layout.width - width))
    y = data.draw(st.integers(0, layout.height - height))
    box = Rect(x, y, x + width, y + height)
    best = max(range(len(layout)), key=lambda tile: layout.clearance(box, tile))
    if layout.overlap >= 2 * context + max(width, height):
        assert layout.is_complete(box, best, context)
        assert layout.is_complete_somewhere(box, context)


@given(layouts(), st.data())
def test_what_is_said_of_a_box_is_what_the_tiles_show(layout: Layout, data: st.DataObject) -> None:
    x0 = data.draw(st.integers(0, layout.width - 1))
    y0 = data.draw(st.integers(0, layout.height - 1))
    box = Rect(
        x0,
        y0,
        data.draw(st.integers(x0 + 1, layout.width)),
        data.draw(st.integers(y0 + 1, layout.height)),
    )
    margin = data.draw(st.integers(0, 5))
    seeing = [n for n, rect in enumerate(layout.rects) if box.intersection(rect).filled]
    assert layout.last_tile(box) == seeing[-1]
    assert layout.is_shared(box) == (len(seeing) > 1)
    complete = []
    for tile, rect in enumerate(layout.rects):
        clear = (
            box.x0 - rect.x0 >= (margin if rect.x0 else 0)
            and box.y0 - rect.y0 >= (margin if rect.y0 else 0)
            and rect.x1 - box.x1 >= (margin if rect.x1 < layout.width else 0)
            and rect.y1 - box.y1 >= (margin if rect.y1 < layout.height else 0)
        )
        assert layout.is_complete(box, tile, margin) == clear
        complete.append(clear)
    assert layout.is_complete_somewhere(box, margin) == any(complete)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (0, 0, "tile is 0; expected the side of a tile in pixels"),
        (64, 64, "overlap is 64 with tiles of 64 pixels; expected 0 to 63"),
        (64, -1, "overlap is -1 with tiles of 64 pixels; expected 0 to 63"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tile: int, overlap: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(100, 100, tile, overlap)


def test_more_tiles_than_anybody_waits_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="tiles of 1024 pixels with overlap 1023; expected at"):
        Layout(16384, 16384, 1024, 1023)
