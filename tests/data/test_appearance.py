"""Random changes of pixels that leave instances where they are."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.data.appearance import RandomAppearance, blur, gamma, noise


def pixels(channels: int = 3, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 11, channels)).astype(kind)


def test_gamma_keeps_black_and_white_and_darkens_what_is_between() -> None:
    image = np.array([[[0], [51], [255]]], np.uint8)
    assert gamma(2.0, image).ravel().tolist() == [0, 10, 255]  # 255 * 0.2 ** 2 = 10.2
    floats = np.array([[[-51.0], [510.0]]], np.float32)
    np.testing.assert_allclose(gamma(2.0, floats).ravel(), [-10.2, 1020], rtol=1e-5)


def test_a_blur_is_a_gaussian_filter_and_none_at_0() -> None:
    image = pixels()
    np.testing.assert_array_equal(blur(1.5, image), cv2.GaussianBlur(image, (0, 0), 1.5))
    assert blur(0.0, image) is image
    np.testing.assert_array_equal(blur(1.5, image[:, ::-1]), blur(1.5, image[:, ::-1].copy()))


def test_noise_has_its_deviation_is_equal_in_all_channels_and_repeats() -> None:
    grey = np.full((60, 60, 3), 100, np.uint8)
    changed = noise(8.0, grey, seed=1)
    assert (changed[..., 0] == changed[..., 2]).all()
    assert 7 < changed[..., 0].std() < 9
    np.testing.assert_array_equal(changed, noise(8.0, grey, seed=1))
    assert (changed != noise(8.0, grey, seed=2)).any()


def test_noise_of_two_frames_differs_under_one_transform() -> None:
    first, second = np.full((2, 30, 30, 3), 100, np.uint8)
    second[0, 0] = 101
    difference = (
        noise(8.0, first, seed=1)
        - second.astype(float)
        - (noise(8.0, second, seed=1) - second.astype(float))
    )
    assert difference.std() > 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_shape_and_type_stay_and_coordinates_and_masks_do_not_move(
    channels: int, kind: type, seed: int
) -> None:
    np.random.seed(seed)
    image = pixels(channels, kind)
    steps = [
        RandomAppearance(gamma, (0.5, 2.0), logarithmic=True),
        RandomAppearance(blur, (0.0, 2.0)),
        RandomAppearance(noise, (0.0, 9.0), seeded=True),
    ]
    for step in steps:
        transform = step.get_transform(image)
        changed = transform.apply_image(image)
        assert changed.shape == image.shape and changed.dtype == image.dtype
        assert np.isfinite(changed).all()
        np.testing.assert_array_equal(transform.apply_image(image), changed)
        mask = image[..., 0] > 100
        assert (transform.apply_segmentation(mask) == mask).all()
        assert transform.apply_box(np.array([[1.0, 2, 3, 4]])).tolist() == [[1, 2, 3, 4]]
