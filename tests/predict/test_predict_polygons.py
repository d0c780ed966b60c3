"""Masks as polygons: pycocotools draws them as the masks they come from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_util
from scipy.ndimage import binary_fill_holes

from instseg.predict.polygons import as_rle, outlines

MASKS = arrays(
    np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 1)
)


@given(MASKS)
def test_polygons_are_the_mask_with_its_holes_filled(mask: np.ndarray) -> None:
    polygons = outlines(mask)
    assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
    assert bool(polygons) == mask.any()
    if polygons:
        drawn = mask_util.decode(as_rle(polygons, *mask.shape))
        assert np.array_equal(drawn, binary_fill_holes(mask))


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_a_rectangle_is_the_polygon_of_its_corners(size: tuple[int, int]) -> None:
    height, width = size
    mask = np.zeros((5, 5), dtype=np.uint8)
    mask[1 : 1 + height, 2 : 2 + width] = 1
    [polygon] = outlines(mask)
    corners = set(zip(polygon[::2], polygon[1::2], strict=True))
    assert corners == {(x, y) for x in (2, 2 + width) for y in (1, 1 + height)}
