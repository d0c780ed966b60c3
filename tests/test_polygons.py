"""Polygons of masks."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from instseg.masks import decode, polygons

CROPS = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@given(CROPS)
def test_polygons_are_valid_and_cover_exactly_the_pixels(crop: np.ndarray) -> None:
    parts = polygons(5, 3, crop)
    shapes = [shapely.Polygon(part.outer, part.holes) for part in parts]
    assert all(shape.is_valid and shape.is_simple for shape in shapes)
    whole = shapely.MultiPolygon(shapes)
    assert whole.is_valid and whole.area == crop.sum() == sum(part.area() for part in parts)
    assert all(shape.exterior.is_ccw for shape in shapes)
    assert not any(hole.is_ccw for shape in shapes for hole in shape.interiors)
    y, x = np.indices(crop.shape)
    inside = shapely.contains_xy(whole, x.ravel() + 5.5, y.ravel() + 3.5)
    np.testing.assert_array_equal(inside.reshape(crop.shape), crop)
    areas = [part.area() for part in parts]
    assert areas == sorted(areas, reverse=True)


@given(CROPS)
def test_the_outer_rings_are_for_pycocotools_the_parts_with_their_holes_filled(
    crop: np.ndarray,
) -> None:
    outer = [part.outer.ravel().tolist() for part in polygons(0, 0, crop)]
    labels, count = ndimage.label(crop)
    parts = [ndimage.binary_fill_holes(labels == number) for number in range(1, count + 1)]
    assert len(outer) == count
    if count:
        np.testing.assert_array_equal(decode(outer, *crop.shape), np.any(parts, axis=0))


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_a_rectangle_is_the_polygon_of_its_corners(size: tuple[int, int]) -> None:
    height, width = size
    [(outer, holes)] = polygons(2, 1, np.ones(size, bool))
    assert not holes and len(outer) == 4
    corners = {(x, y) for x in (2, 2 + width) for y in (1, 1 + height)}
    assert set(map(tuple, outer.tolist())) == corners
