"""INPUT.NORMALIZE and INPUT.CHANNELS: pixels of any depth become 0 to 255 alike everywhere."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg as stock_cfg
from detectron2.utils import logger as detectron2_logger
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import instseg
from instseg import Predictor, cli
from instseg.data.image_arrays import check_image
from instseg.data.images import read_image, read_pixels
from instseg.data.intensity import Intensity, ModelImage, percentiles
from instseg.data.mappers import build_test_mapper, build_train_mapper
from instseg.data.pillow_images import convert_image
from instseg.data.samples import build_sample_loader
from instseg.errors import ConfigError, ImageError
from tests.data.test_one_reader import SMALL, SSD, VIDEO, record

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
GREY = RNG.normal(1000, 100, (30, 40)).clip(0).astype(np.uint16)
DEEP = RNG.integers(0, 4096, (30, 40, 3), dtype=np.uint16)
PERCENTILE = Intensity("percentile")


@pytest.fixture(autouse=True)
def _log_everything_anew() -> None:
    detectron2_logger._LOG_COUNTER.clear()


def stretched(channel: np.ndarray, low: float, high: float) -> np.ndarray:
    """The formula, straight."""
    scaled = (channel.astype(np.float64) - low) / (high - low) * 255
    return np.floor(scaled.clip(0, 255) + 0.5)


TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]


@given(
    st.sampled_from(["uint8", "int8", "uint16", "int16"]).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    ),
    st.tuples(st.floats(0, 100), st.floats(0, 100)),
)
def test_counted_percentiles_are_numpys(values: np.ndarray, percents: tuple[float, float]) -> None:
    assert percentiles(values, percents) == pytest.approx(np.percentile(values, percents))


@pytest.mark.parametrize("kind", TYPES)
def test_the_percentiles_of_any_type_become_0_and_255(kind: str) -> None:
    limit = 250 if kind == "uint8" else 120 if kind == "int8" else 4000
    values = RNG.integers(0, limit, (50, 60, 1)).astype(kind)
    low, high = np.percentile(values.astype(np.float64), (1, 99.8))
    result = PERCENTILE.apply(values, source="a", format="L")
    assert result.dtype == np.uint8 and result.shape == (50, 60, 1)
    assert np.abs(result - stretched(values, low, high)).max() <= (kind == "float16")


def test_each_channel_has_its_own_percentiles() -> None:
    result = PERCENTILE.apply(DEEP, source="a", format="RGB")
    for i in range(3):
        expected = stretched(DEEP[:, :, i], *np.percentile(DEEP[:, :, i], (1, 99.8)))
        assert np.array_equal(result[:, :, i], expected)


def test_range_scales_all_images_alike() -> None:
    result = Intensity("range", (1000, 3000)).apply(DEEP, source="a", format="RGB")
    assert np.array_equal(result, stretched(DEEP, 1000, 3000))


def test_scaled_values_give_the_image_of_the_original() -> None:
    """An offset and a factor change nothing under percentile."""
    original = RNG.integers(0, 256, (90, 80, 1), dtype=np.uint8)
    for deep in (original.astype(np.uint16) * 257, original.astype(np.uint16) * 16 + 300):
        expected = PERCENTILE.apply(original, source="a", format="L")
        assert np.array_equal(PERCENTILE.apply(deep, source="a", format="L"), expected)


def test_channels_are_picked_and_repeated_in_the_order_of_the_format() -> None:
    many = RNG.integers(0, 256, (6, 7, 5), dtype=np.uint8)
    picked = Intensity(channels=(4, 4, 1))
    rgb = picked.apply(many, source="a", format="RGB")
    assert np.array_equal(rgb, many[:, :, [4, 4, 1]])
    assert np.array_equal(picked.apply(many, source="a", format="BGR"), rgb[:, :, ::-1])
    grey = Intensity(channels=(3,)).apply(many, source="a", format="L")
    assert np.array_equal(grey, many[:, :, 3:4])


def test_a_constant_image_becomes_0_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        result = PERCENTILE.apply(np.full((5, 6, 1), 700, np.uint16), source="a.tif", format="BGR")
        assert result.shape == (5, 6, 3) and not result.any()
    expected = "a.tif: channel 0 is 700 everywhere; INPUT.NORMALIZE percentile makes it 0"
    assert caplog.messages == [f"{expected} (said once)"]


def test_a_few_bright_pixels_remain_where_both_percentiles_are_the_background() -> None:
    values = np.full((100, 100, 1), 50, np.uint16)
    values[3, 4] = 900
    result = PERCENTILE.apply(values, source="a", format="L")
    assert result[3, 4] == 255 and result.sum() == 255


@pytest.mark.parametrize(
    ("pixels", "intensity", "message"),
    [
        (GREY[:, :, None], Intensity(), "found uint16 with values of .*; set INPUT.NORMALIZE perc"),
        (np.full((3, 4, 1), np.nan), PERCENTILE, "a.tif: contains non-finite values"),
        (np.full((3, 4, 1), np.inf), Intensity("range"), "a.tif: contains non-finite values"),
        (np.zeros((3, 4, 2), np.uint8), PERCENTILE, "has 2 channels; .*set INPUT.CHANNELS"),
        (np.zeros((3, 4, 5), np.uint8), Intensity(), "has 5 channels; .*set INPUT.CHANNELS"),
        (
            np.zeros((3, 4, 1), np.uint8),
            Intensity(channels=(0, 0, 1)),
            r"has 1 channel, counted from 0; INPUT.CHANNELS \(0, 0, 1\) asks for channel 1",
        ),
        (np.zeros((3, 4, 1), complex), PERCENTILE, "has pixels of type complex128"),
    ],
)
def test_what_does_not_fit_is_one_line(
    pixels: np.ndarray, intensity: Intensity, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        intensity.apply(pixels, source="a.tif", format="BGR")


def test_a_stock_configuration_leaves_images_as_they_are() -> None:
    assert Intensity.of(stock_cfg()) == Intensity()
    assert not Intensity.of(instseg.get_cfg()).changes


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("NORMALIZE", "max", "none, percentile or range"),
        ("NORMALIZE_RANGE", (-1.0, 99.0), r"\(lower, higher\) percentile from 0 to 100"),
        ("NORMALIZE_RANGE", (99.0, 99.0), r"\(lower, higher\) percentile from 0 to 100"),
        ("NORMALIZE_RANGE", (1.0,), r"\(lower, higher\) percentile"),
        ("CHANNELS", (0, 1), r"\(\) or 3 numbers of channels from 0 on, as INPUT.FORMAT is BGR"),
        ("CHANNELS", (0, -1, 1), r"\(\) or 3 numbers"),
    ],
)
def test_values_that_cannot_be_used_are_refused(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"INPUT.{key} is .*; expected {expected}"):
        Predictor("mask_rcnn/mask_rcnn_shapes.yaml", overrides=[*SMALL, f"INPUT.{key}", value])


def test_a_range_of_pixel_values_may_be_above_100() -> None:
    overrides = [*SMALL, "INPUT.NORMALIZE", "range", "INPUT.NORMALIZE_RANGE", (300, 4000)]
    predictor = Predictor("mask_rcnn/mask_rcnn_shapes.yaml", overrides=overrides)
    assert predictor.intensity == Intensity("range", (300, 4000))


FILES = {
    "grey.tif": lambda path: tifffile.imwrite(path, GREY),
    "grey.png": lambda path: Image.fromarray(GREY).save(path),
    "colour.png": lambda path: cv2.imwrite(str(path), DEEP[:, :, ::-1]),
    "colour.ppm": lambda path: cv2.imwrite(str(path), DEEP[:, :, ::-1]),
    "colour.tif": lambda path: tifffile.imwrite(path, DEEP, photometric="rgb"),
    "float.tif": lambda path: tifffile.imwrite(path, GREY.astype(np.float32) / 4096),
    "colour.jpg": lambda path: Image.fromarray((DEEP // 16).astype(np.uint8)).save(path),
}


def config(*overrides: Any) -> Any:
    every = [*SMALL, "INPUT.NORMALIZE", "percentile", *overrides]
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", every)


@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_and_its_array_give_what_numpy_computes(
    tmp_path: Path, name: str, format: str
) -> None:
    FILES[name](tmp_path / name)
    pixels = read_pixels(tmp_path / name)
    if name != "colour.jpg":
        expected = {"grey": GREY[:, :, None], "colour": DEEP, "float": GREY[:, :, None] / 4096}
        assert np.allclose(pixels, expected[name.split(".")[0]])
    channels = [
        stretched(x, *np.percentile(x.astype(np.float64), (1, 99.8)))
        for x in np.moveaxis(pixels, 2, 0)
    ]
    image = Image.fromarray(np.stack(channels * (3 // len(channels)), axis=2).astype(np.uint8))
    same = convert_image(image, format=format)
    assert np.array_equal(read_image(tmp_path / name, format=format, intensity=PERCENTILE), same)
    array = pixels[:, :, ::-1] if pixels.shape[2] == 3 else pixels
    assert np.array_equal(check_image(array, format=format, intensity=PERCENTILE), same)


def test_every_way_to_read_a_file_scales_it_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DEEP, photometric="rgb")
    expected = torch.from_numpy(
        read_image(path, intensity=PERCENTILE).transpose(2, 0, 1).astype(np.float32)
    )
    cfg = config("INPUT.MIN_SIZE_TEST", 0, "INPUT.RANDOM_FLIP", "none")
    for mapper in (build_test_mapper(cfg), build_train_mapper(cfg, augment=False)):
        assert torch.equal(mapper(record(str(path)))["image"].float(), expected)
    predictor = Predictor(cfg)
    bgr = np.ascontiguousarray(DEEP[:, :, ::-1])
    for item in (path, bgr, ModelImage(read_image(path, intensity=PERCENTILE))):
        prepared = predictor._prepare(item, "image").image
        assert prepared is not None and torch.equal(prepared, expected)


def test_training_with_augmentation_videos_and_patches_takes_deep_images(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    item = record(str(tmp_path / "a.tif"))
    video = build_train_mapper(config(*VIDEO), augment=True)(item)
    assert video["reference_image"].std() > 5
    assert build_train_mapper(config(*SSD), augment=True)(item)["image"].std() > 5
    deepmask = ["INPUT.NORMALIZE", "percentile", *SMALL]
    cfg = instseg.load_cfg("deepmask/deepmask_shapes.yaml", deepmask)
    assert 120 < next(iter(build_sample_loader(cfg, [item])))[0]["image"].max() <= 255


def test_an_array_of_many_channels_is_picked_from() -> None:
    many = RNG.integers(0, 4096, (30, 40, 5), dtype=np.uint16)
    intensity = Intensity("percentile", channels=(4, 0, 0))
    image = check_image(many, intensity=intensity)
    assert np.array_equal(image, intensity.apply(many, source="a", format="BGR"))
    with pytest.raises(ImageError, match=r"image has 5 channels \(shape"):
        check_image(many, intensity=PERCENTILE)


def test_an_array_of_more_than_8_bits_is_refused_with_the_key() -> None:
    with pytest.raises(ImageError, match="found uint16 with min.* or set INPUT.NORMALIZE percent"):
        check_image(GREY)


def test_check_data_says_which_keys_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "0.tif", GREY)
    two = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "1.tif", DEEP[:, :, :2], **two)
    images = [{"id": i, "file_name": f"{i}.tif", "height": 30, "width": 40} for i in range(2)]
    one = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [2, 2, 9, 9], "iscrowd": 0}
    one |= {"area": 81, "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]]}
    content = {"images": images, "annotations": [one], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    arguments = ["check-data", f"coco:{tmp_path}/a.json:{tmp_path}"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "more than 8 bits per channel" in printed and "0, 1" in printed
    assert f"found 1 channel of uint16 with values of {GREY.min()} to {GREY.max()}; set " in printed
    assert "INPUT.NORMALIZE percentile" in printed
    assert "1.tif: has 2 channels of uint16; expected 1 or 3: set INPUT.CHANNELS" in printed
    assert cli.main([*arguments, "--strict"]) == 1
