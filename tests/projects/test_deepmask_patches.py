"""DeepMask's rules for training windows, against numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from instseg.projects.deepmask.patches import (
    Rules,
    Window,
    canonical_scale,
    crop,
    is_learnable,
    mask_window,
    negative_window,
    positive_window,
)

RELEASED = Rules(160, 16, 92, 112, 16.0, 0.25)
EXACT = replace(RELEASED, shift=0.0, scale_jitter=0.0)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
sides = st.floats(1.0, 2000.0)


def test_the_network_sees_192_pixels() -> None:
    assert RELEASED.input_size == 192


@pytest.mark.parametrize(
    ("longest_side", "scale"),
    [
        (92, 0.25),  # 92 * 2^0.25 = 109.4, the larger end
        (93, 0.0),
        (109, 0.0),  # 92 * 2^(1/4) = 109.41 ends the interval
        (110, -0.25),
        (184, -0.75),  # one octave larger than 92
        (46, 1.25),
        (93 * 256, -8.0),
        (93 / 256, 8.0),
    ],
)
def test_an_instance_has_the_scale_of_the_first_interval_it_is_in(
    longest_side: float, scale: float
) -> None:
    assert canonical_scale(longest_side, 92) == scale


@given(sides)
def test_a_rescaled_instance_is_up_to_a_quarter_octave_larger_than_canonical(side: float) -> None:
    scale = canonical_scale(side, 92)
    assert scale is not None and (4 * scale).is_integer()
    assert 1 - 1e-12 < side * 2**scale / 92 < 2**0.25 + 1e-12


@pytest.mark.parametrize("side", [0.0, -3.0, math.nan, math.inf, 0.1, 1e6])
def test_an_instance_of_an_impossible_size_has_no_scale(side: float) -> None:
    assert canonical_scale(side, 92) is None


@pytest.mark.parametrize(
    ("box", "area", "learnable"),
    [
        ((0, 0, 20, 5), 100.0, True),
        ((0, 0, 20, 5), 99.0, False),
        ((0, 0, 30, 4.9), 140.0, False),
        ((0, 0, math.nan, 5), 100.0, False),
        ((0, 0, 20, 20), math.nan, False),
    ],
)
def test_masks_are_learnt_of_100_pixels_and_sides_of_5(
    box: tuple[float, ...], area: float, learnable: bool
) -> None:
    assert is_learnable(box, area) is learnable


def test_without_jitter_the_longer_side_becomes_92_pixels() -> None:
    # 184 pixels: the window is twice 192, around the middle of the box.
    window = mask_window((10, 20, 194, 60), EXACT, np.random.default_rng(0))
    assert window == Window(102.0, 40.0, 384.0)


@given(seeds, sides, sides)
def test_jitter_moves_16_pixels_and_a_quarter_octave_at_most(
    rng: np.random.Generator, width: float, height: float
) -> None:
    window = mask_window((7, 3, 7 + width, 3 + height), RELEASED, rng)
    zoom = 192 / window.side
    assert abs(math.log2(max(width, height) * zoom / 92)) <= 0.25 + 1e-9
    assert abs(window.x - (7 + width / 2)) * zoom <= 16 + 1e-6
    assert abs(window.y - (3 + height / 2)) * zoom <= 16 + 1e-6


def test_jitter_goes_both_ways_on_both_axes_and_in_scale() -> None:
    rng = np.random.default_rng(0)
    windows = [mask_window((0, 0, 92, 92), RELEASED, rng) for _ in range(200)]
    for values, low, high in (
        ([w.x - 46 for w in windows], -19.1, 19.1),
        ([w.y - 46 for w in windows], -19.1, 19.1),
        ([math.log2(w.side / 192) for w in windows], -0.25, 0.25),
    ):
        assert low < min(values) < 0.8 * low < 0.8 * high < max(values) < high


def test_a_positive_window_is_centred_on_its_instance_at_its_canonical_scale() -> None:
    # 100 pixels is scale 0: a window of 192; 50 pixels is scale 1: one of 96.
    boxes = [(0, 0, 100, 40), (10, 10, 40, 60)]
    rng = np.random.default_rng(0)
    windows = {positive_window(boxes, RELEASED, rng) for _ in range(40)}
    assert windows == {Window(50, 20, 192), Window(25, 35, 96)}


def test_scales_are_drawn_before_instances() -> None:
    # Nine instances of one scale and one of another: half of the windows show the latter.
    boxes = [(i, 0, i + 100, 50) for i in range(9)] + [(0, 0, 50, 50)]
    rng = np.random.default_rng(0)
    windows = [positive_window(boxes, RELEASED, rng) for _ in range(400)]
    assert 160 < sum(window.side == 96 for window in windows) < 240


@given(seeds, st.floats(5, 300), st.floats(20, 400), st.floats(20, 400))
def test_a_negative_window_is_48_pixels_away_from_instances_of_similar_scale(
    rng: np.random.Generator, side: float, x: float, y: float
) -> None:
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    window = negative_window((400, 400), [box], RELEASED, rng)
    key = canonical_scale(side, 92)
    assert window is not None and key is not None
    zoom = 192 / window.side
    assert round(math.log2(zoom), 6) in np.arange(-3, 2.25, 0.25)
    assert 0 <= window.x <= 400 and 0 <= window.y <= 400
    if abs(math.log2(zoom) - key) <= 2.5:
        assert math.hypot(window.x - x, window.y - y) * zoom >= 48 - 1e-6


def test_an_instance_of_another_scale_does_not_matter_to_a_negative() -> None:
    # 11.6 pixels is scale 3: windows of scales up to 0.25 may show it, larger ones may not, for
    # nothing of an image of 8 pixels is 48 / 4 pixels away from its middle.
    rng = np.random.default_rng(0)
    box = (4 - 5.8, 4 - 5.8, 4 + 5.8, 4 + 5.8)
    windows = [negative_window((8, 8), [box], RELEASED, rng) for _ in range(50)]
    assert {window.side for window in windows if window is not None} <= {
        192 / 2**scale for scale in np.arange(-3, 0.5, 0.25)
    }


def test_an_image_without_room_has_no_negative_window() -> None:
    # Instances of scales -2, 0 and 2 in the middle of an image whose corners are too near even when
    # enlarged four times: hypot(4, 4) * 4 < 48.
    boxes = [(4 - m / 2, 4 - m / 2, 4 + m / 2, 4 + m / 2) for m in (25, 100, 400)]
    assert negative_window((8, 8), boxes, RELEASED, np.random.default_rng(0)) is None


def test_a_window_is_10_pixels_at_least() -> None:
    # 1 pixel is scale 6.75, a window of 1.8 pixels.
    window = positive_window([(5, 5, 6, 6)], RELEASED, np.random.default_rng(0))
    assert window == Window(5.5, 5.5, 10.0)


def image(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def test_a_shrunk_window_has_means() -> None:
    patch = crop(image([0, 100], [200, 40]), Window(1, 1, 2), 1, fill=7.0)
    assert patch.tolist() == [[[85.0]]]


def test_an_enlarged_window_is_interpolated_between_centres() -> None:
    # New centres .25 .75 1.25 1.75 against old ones .5 1.5; beyond the first, half is the fill.
    patch = crop(image([0, 100], [0, 100]), Window(1, 1, 2), 4, fill=40.0)
    assert patch[0, 1].tolist() == pytest.approx(
        [0.75 * (0.75 * 0) + 0.25 * 0 + (1 - 0.75) * 40, 25.0, 75.0, 85.0]
    )


def test_a_window_between_pixels_weighs_both() -> None:
    patch = crop(image([0, 100, 200]), Window(1.25, 0.5, 1), 1, fill=0.0)
    assert patch.tolist() == [[[0.25 * 0 + 0.75 * 100]]]


def test_outside_the_image_is_the_fill() -> None:
    patch = crop(image([10, 10], [10, 10]), Window(0, 0, 4), 4, fill=127.5)
    expected = torch.full((4, 4), 127.5)
    expected[2:, 2:] = 10
    assert torch.equal(patch[0], expected)


@pytest.mark.parametrize("centre", [(-50, 1), (1, -50), (50, 50)])
def test_a_window_far_outside_is_all_fill(centre: tuple[float, float]) -> None:
    patch = crop(image([10, 10], [10, 10]), Window(*centre, 9), 3, fill=127.5)
    assert torch.equal(patch, torch.full((1, 3, 3), 127.5))


@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_whole_ratios_agree_with_pooling(rng: np.random.Generator, ratio: int, size: int) -> None:
    side = ratio * size
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = F.avg_pool2d(torch.from_numpy(pixels).permute(2, 0, 1).float(), ratio)
    patch = crop(pixels, Window(side / 2, side / 2, side), size, fill=9.0)
    torch.testing.assert_close(patch, expected, rtol=0, atol=1e-3)


@given(seeds, st.floats(0.5, 90), st.floats(-20, 40), st.floats(-20, 40), st.integers(1, 20))
def test_an_image_of_the_fill_stays_as_it_is(
    rng: np.random.Generator, side: float, x: float, y: float, size: int
) -> None:
    patch = crop(np.full((9, 17), 127, np.uint8), Window(x, y, side), size, fill=127.0)
    torch.testing.assert_close(patch, torch.full((1, size, size), 127.0), rtol=0, atol=1e-3)
