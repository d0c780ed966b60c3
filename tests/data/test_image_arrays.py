"""Images that a caller gives as arrays: 8-bit colour, or an error that says what is expected."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils import logger as detectron2_logger
from PIL import Image

from instseg.data.image_arrays import check_image
from instseg.data.pillow_images import convert_image
from instseg.errors import ImageError

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


@pytest.fixture(autouse=True)
def _log_everything_anew() -> None:
    detectron2_logger._LOG_COUNTER.clear()


def test_a_pillow_image_becomes_a_bgr_array() -> None:
    assert np.array_equal(convert_image(Image.fromarray(RGB)), RGB[:, :, ::-1])


def test_none_is_refused_with_the_likely_reason() -> None:
    with pytest.raises(ValueError, match="cat is None — file missing or unreadable?"):
        check_image(None, source="cat")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("cat.jpg", "image is a str"),
        (Image.fromarray(RGB), "image is a Image"),
        (torch.zeros(3, 12, 20), r"image is a torch.Tensor of shape \(3, 12, 20\)"),
        (RGB.transpose(2, 0, 1), r"image has shape \(3, 12, 20\), channels first"),
        (RGB[None], r"image has shape \(1, 12, 20, 3\); .*as a list"),
        (RGB[0, 0], r"image has shape \(3,\)"),
    ],
)
def test_a_wrong_type_or_layout_is_a_type_error_that_names_the_right_one(
    image: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        check_image(image)
    assert "expected a NumPy array of shape (H, W, 3) with 8-bit values (uint8)" in str(
        caught.value
    )


@pytest.mark.parametrize("image", [GREY, GREY[:, :, None], np.matrix(GREY)])
def test_a_grey_array_is_replicated_and_that_is_said_once(
    image: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert np.array_equal(check_image(image), np.dstack([GREY] * 3))
    assert [record.message for record in caplog.records] == [
        "image: grey, replicated to three channels (said once)"
    ]


def test_the_alpha_channel_of_an_array_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert np.array_equal(check_image(np.dstack([RGB, GREY])), RGB)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "alpha" in caplog.text


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB.astype(np.uint16) * 200, r"found uint16 with min=\d+, max=\d+; scale it to 0 to 255"),
        (RGB.astype(np.int64), r"found int64 with min=\d+, max=\d+"),
        (RGB > 100, "found bool"),
        (RGB.astype(object), "found object"),
        (RGB.astype(">f4"), "found >f4"),
        (
            RGB / 255.0,
            r"float64 values in 0 to 1 \(max=[\d.]+\), expected 0 to 255; multiply by 255",
        ),
        (RGB - 128.0, "min=-.*undo any normalisation"),
        (RGB * 2.0, "max=5[0-9]+; undo"),
        (np.full((4, 5, 3), np.nan), "contains non-finite values"),
        (np.full((4, 5, 3), np.inf, np.float16), "contains non-finite values"),
        (np.ma.masked_invalid(np.where(RGB < 9, np.nan, RGB)), "contains non-finite values"),
        (np.zeros((0, 0, 3), np.uint8), "image is empty: 0x0 pixels"),
        (np.zeros((0, 9), np.uint8), "image is empty: 9x0 pixels"),
        (np.zeros((6, 5, 2), np.uint8), "image has 2 channels"),
        (np.broadcast_to(np.uint8(0), (30_000, 30_000, 3)), "30000x30000 pixels; at most"),
    ],
)
def test_an_array_that_no_model_can_use_is_an_image_error(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        check_image(image)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_an_image_as_high_as_others_have_channels_is_taken_as_it_is(height: int) -> None:
    assert np.array_equal(check_image(RGB[:height]), RGB[:height])
    assert check_image(GREY[:height]).shape == (height, 20, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("factor", [1, 0])
def test_floats_that_span_0_to_255_are_taken_as_they_are(dtype: Any, factor: int) -> None:
    image = (RGB * factor).astype(dtype)
    assert check_image(image) is image
