"""SSD's augmentations: what each does to images, boxes and masks, and their mapper."""

from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import instseg
from instseg.data.augmentations import (
    CanvasTransform,
    PhotometricDistortion,
    PhotometricTransform,
    RandomBoxCrop,
    RandomExpansion,
    build_ssd_augmentations,
)
from instseg.data.image_mapper import SSDMapper
from instseg.data.mappers import build_train_mapper
from instseg.errors import ConfigError


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)


def cfg_with(*overrides: Any) -> Any:
    return instseg.load_cfg("yolact/yolact_resnet50.yaml", ["INPUT.SQUARE_SIZE", 64, *overrides])


def test_colours_that_do_not_change_only_become_float() -> None:
    image = noise(5, 7)
    changed = PhotometricTransform("RGB").apply_image(image)
    assert changed.dtype == np.float32 and (changed == image).all()


def test_brightness_and_contrast_are_not_clipped() -> None:
    image = np.full((2, 2, 3), 250, np.uint8)
    changed = PhotometricTransform("RGB", brightness=20, contrast=1.5).apply_image(image)
    assert (changed == 405).all()


def test_the_hue_turns_red_to_green() -> None:
    """120 degrees; in BGR the last channel is red."""
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 2] = 200
    changed = PhotometricTransform("BGR", hue=120).apply_image(red)
    np.testing.assert_allclose(changed, [[[0, 200, 0]]], atol=1e-3)


def test_no_saturation_leaves_the_largest_channel() -> None:
    changed = PhotometricTransform("RGB", saturation=0).apply_image(noise(4, 4))
    np.testing.assert_allclose(changed, np.repeat(noise(4, 4).max(2)[..., None], 3, 2), atol=1e-3)


def test_random_colours_stay_in_their_ranges() -> None:
    drawn = [PhotometricDistortion("RGB").get_transform(noise(2, 2)) for _ in range(300)]
    for name, neutral, low, high in (
        ("brightness", 0, -32, 32),
        ("contrast", 1, 0.5, 1.5),
        ("saturation", 1, 0.5, 1.5),
        ("hue", 0, -18, 18),
    ):
        values = np.array([getattr(x, name) for x in drawn])
        assert 0.4 < (values == neutral).mean() < 0.6, name
        assert low <= values.min() < low * 0.8 + high * 0.2, name
        assert high >= values.max() > high * 0.8 + low * 0.2, name
    assert 0.4 < np.mean([x.contrast_first for x in drawn]) < 0.6


def test_expansion_moves_image_boxes_and_masks_together() -> None:
    image, mask = noise(4, 5), np.ones((4, 5), np.uint8)
    transform = CanvasTransform(3, 2, 10, 9, (1, 2, 3))
    grown, grown_mask = transform.apply_image(image), transform.apply_segmentation(mask)
    assert grown.shape == (9, 10, 3) and (grown[2:6, 3:8] == image).all()
    assert (grown[0, 0] == (1, 2, 3)).all()
    assert grown_mask.sum() == 20 and grown_mask[2:6, 3:8].all()
    assert transform.apply_box(np.array([[0, 0, 5, 4]])).tolist() == [[3, 2, 8, 6]]


@given(
    x=st.integers(-8, 8), y=st.integers(-8, 8), width=st.integers(1, 9), height=st.integers(1, 9)
)
def test_what_lies_beyond_a_canvas_is_cut_off(x: int, y: int, width: int, height: int) -> None:
    """Pixel (column, row) of the image is pixel (column + x, row + y) of the canvas."""
    image = noise(4, 5)
    expected = np.full((height, width, 3), (7, 8, 9), np.uint8)
    for row, column in np.ndindex(4, 5):
        if 0 <= row + y < height and 0 <= column + x < width:
            expected[row + y, column + x] = image[row, column]
    image.flags.writeable = False  # as those of a reader
    transform = CanvasTransform(x, y, width, height, (7.9, 8.0, 9.2))  # 8 bits take the whole part
    assert (transform.apply_image(image) == expected).all()
    mask = transform.apply_segmentation(np.ones((4, 5), np.uint8))
    assert mask.shape == (height, width)
    rows, columns = (np.arange(size) - start for size, start in ((height, y), (width, x)))
    assert (mask == np.outer((rows >= 0) & (rows < 4), (columns >= 0) & (columns < 5))).all()


def test_expansion_and_crop_in_one_give_what_both_give_in_turn() -> None:
    image, boxes = noise(30, 40).astype(np.float32), np.array([[3.5, 4, 20, 25], [30, 2, 38, 9]])
    mask = (image[:, :, 0] > 99).astype(np.uint8)
    kinds = set()
    for seed in range(60):
        np.random.seed(seed)
        expansion, crop = RandomExpansion((1.5, 2, 3), 3.0), RandomBoxCrop()
        data = T.AugInput(image, boxes=boxes, sem_seg=mask)
        both = T.AugmentationList([expansion, crop])(data)
        np.random.seed(seed)
        fused = RandomExpansion((1.5, 2, 3), 3.0, crop).get_transform(image, boxes)
        assert (fused.apply_image(image) == data.image).all()
        assert (fused.apply_segmentation(mask) == data.sem_seg).all()
        assert (fused.apply_box(boxes) == data.boxes).all()
        kinds.add(tuple(type(x).__name__ for x in both.transforms))
    assert len(kinds) == 4


@pytest.mark.parametrize("hue", [-18, 18, 120, -359, 361, 0.25])
@pytest.mark.parametrize("saturation", [1.0, 1.3])
def test_hues_turn_as_by_the_remainder_of_numpy(hue: float, saturation: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 1] *= np.float32(saturation)
    hsv[..., 0] = (hsv[..., 0] + np.float32(np.fmod(hue, 360))) % 360
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    changed = PhotometricTransform("RGB", hue=hue, saturation=saturation).apply_image(image)
    assert (changed == expected).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("horizontal", [True, False])
def test_a_mirror_image_is_stretched_as_a_copy_of_it(channels: int, horizontal: bool) -> None:
    image = noise(48, 30).astype(np.float32)[:, :, :channels]
    mirrored = image[:, ::-1] if horizontal else image[::-1]
    stretch = build_ssd_augmentations(cfg_with())[-1].get_transform(image)
    stretched = stretch.apply_image(mirrored)
    assert stretched.shape == (64, 64, channels)
    copied = stretch.apply_image(np.ascontiguousarray(mirrored))
    np.testing.assert_allclose(stretched, copied, atol=1e-3)
    with_torch = T.ResizeTransform(48, 30, 64, 64).apply_image(np.ascontiguousarray(mirrored))
    np.testing.assert_allclose(stretched, with_torch, atol=0.03)


def test_an_image_grows_by_the_given_ratio_at_most() -> None:
    augmentation = RandomExpansion((0, 0, 0), 3.0)
    sizes = [augmentation.get_transform(noise(10, 20), np.zeros((0, 4))) for _ in range(200)]
    grown = [x for x in sizes if isinstance(x, CanvasTransform)]
    assert 70 < len(grown) < 130
    assert all(20 <= x.width <= 60 and x.x + 20 <= x.width and x.y + 10 <= x.height for x in grown)
    assert max(x.width for x in grown) > 50


@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    box=st.tuples(*[st.floats(0, 1)] * 4),
    seed=st.integers(0, 2**31),
)
def test_a_crop_lies_in_the_image_and_keeps_the_centre_of_an_instance(
    height: int, width: int, box: tuple[float, ...], seed: int
) -> None:
    np.random.seed(seed)
    x0, y0, w, h = box
    boxes = np.array([[x0 * width, y0 * height, 0, 0]])
    boxes[:, 2:] = boxes[:, :2] + (1 + w * (width - 1), 1 + h * (height - 1))
    boxes = np.minimum(boxes, [width, height, width, height])
    transform = RandomBoxCrop().get_transform(np.zeros((height, width, 3)), boxes)
    if isinstance(transform, T.NoOpTransform):
        return
    assert 0 <= transform.x0 and transform.x0 + transform.w <= width
    assert 0 <= transform.y0 and transform.y0 + transform.h <= height
    centre = transform.apply_coords((boxes[:, :2] + boxes[:, 2:]) / 2)
    assert (centre > 0).all() and (centre < (transform.w, transform.h)).all()


def test_the_pipeline_gives_squares_as_opencv_stretches_them() -> None:
    (resize,) = build_ssd_augmentations(cfg_with())[-1:]
    image = noise(48, 30).astype(np.float32)
    stretched = resize.get_transform(image).apply_image(image)
    expected = cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(stretched, expected, atol=1e-3)


def record(tmp_path: Any, *annotations: dict[str, Any]) -> dict[str, Any]:
    Image.fromarray(noise(48, 64)).save(tmp_path / "a.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "height": 48,
        "width": 64,
        "annotations": list(annotations),
    }


def square(x: float, y: float, side: float, **others: Any) -> dict[str, Any]:
    outline = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {
        "bbox": [x, y, side, side],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 2,
        "iscrowd": 0,
        "segmentation": [outline],
    } | others


def mapper(*augmentations: Any) -> SSDMapper:
    return SSDMapper(
        is_train=True,
        augmentations=list(augmentations),
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        plain_augmentations=[T.Resize((24, 32))],
    )


def test_instances_whose_centre_is_cut_off_go_and_others_are_clipped(tmp_path: Any) -> None:
    """The crop ends at x = 20: the first square loses its right half, the second its left one."""
    crop = T.CropTransform(0, 0, 20, 48, 64, 48)
    sample = mapper(crop)(record(tmp_path, square(8, 8, 20), square(14, 30, 16)))
    assert sample["instances"].gt_boxes.tensor.tolist() == [[8, 8, 20, 28]]
    mask = sample["instances"].gt_masks.tensor[0]
    assert mask.shape == (48, 20) and mask.sum() == 12 * 20


def test_an_image_that_loses_all_instances_every_time_is_only_resized(tmp_path: Any) -> None:
    crop = T.CropTransform(40, 30, 20, 10, 64, 48)
    sample = mapper(crop)(record(tmp_path, square(2, 2, 10)))
    assert sample["image"].shape == (3, 24, 32)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[1, 1, 6, 6]]


class CropsOf(T.Augmentation):
    """Crops at the given corners, one at each call."""

    def __init__(self, *corners: tuple[int, int]) -> None:
        super().__init__()
        self.corners = list(corners)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return T.CropTransform(*self.corners.pop(0), 20, 10, 64, 48)


def test_augmentations_that_lose_all_instances_are_drawn_again(tmp_path: Any) -> None:
    sample = mapper(CropsOf((40, 30), (44, 38), (0, 0)))(record(tmp_path, square(2, 2, 10)))
    assert sample["image"].shape == (3, 10, 20)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[2, 2, 12, 10]]


def test_an_instance_whose_mask_is_empty_leaves_an_image_without_instances(tmp_path: Any) -> None:
    empty = square(2, 2, 10, segmentation=mask_util.encode(np.zeros((48, 64), np.uint8, "F")))
    sample = mapper()(record(tmp_path, empty))
    assert sample["image"].shape == (3, 24, 32) and len(sample["instances"]) == 0


@pytest.mark.parametrize(("width", "kept"), [(0.007, 0), (0.0075, 1)])
def test_instances_and_crowds_thinner_than_4_550ths_of_a_pixel_go(
    tmp_path: Any, width: float, kept: int
) -> None:
    thin = square(2, 2, 10, bbox=[2, 2, width, 10])
    flip = mapper(T.HFlipTransform(64))
    sample = flip(record(tmp_path, thin, square(20, 20, 10), {**thin, "iscrowd": 1}))
    assert len(sample["instances"]) == 1 + kept
    assert len(sample["crowd_boxes"]) == kept


def test_an_image_without_instances_is_given(tmp_path: Any) -> None:
    sample = mapper()(record(tmp_path))
    assert len(sample["instances"]) == 0


def test_crowds_become_boxes_of_their_own(tmp_path: Any) -> None:
    crowd = square(10, 10, 20, iscrowd=1, segmentation={"size": [48, 64], "counts": b""})
    sample = mapper(T.HFlipTransform(64))(record(tmp_path, square(2, 2, 10), crowd))
    assert len(sample["instances"]) == 1
    assert sample["crowd_boxes"].tensor.tolist() == [[34, 10, 54, 30]]


def test_colours_expansion_and_crop_can_each_be_left_out() -> None:
    off = ["INPUT.SSD_COLORS", False, "INPUT.SSD_EXPAND_RATIO", 1.0, "INPUT.SSD_CROP", False]
    kinds = [type(step).__name__ for step in build_ssd_augmentations(cfg_with(*off))]
    assert kinds == ["RandomFlip", "Stretch"]


def test_masks_and_boxes_agree_after_the_whole_pipeline() -> None:
    """A box may be larger than the mask of a hidden or cut instance, never much smaller."""
    cfg = cfg_with("DATASETS.TRAIN", "('shapes_val',)")
    augmented = build_train_mapper(cfg, augment=True)
    given = [augmented(x) for x in DatasetCatalog.get("shapes_val")[:40]]
    assert all(len(sample["instances"]) for sample in given)
    for sample in given:
        assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.float32
        tight = sample["instances"].gt_masks.get_bounding_boxes().tensor
        boxes = sample["instances"].gt_boxes.tensor
        assert (tight[:, :2] >= boxes[:, :2] - 1.5).all()
        assert (tight[:, 2:] <= boxes[:, 2:] + 1.5).all()


def test_without_augmentation_images_keep_their_size() -> None:
    cfg = cfg_with("DATASETS.TRAIN", "('shapes_val',)")
    sample = build_train_mapper(cfg, augment=False)(DatasetCatalog.get("shapes_val")[0])
    assert sample["image"].shape == (3, 128, 128)
    assert sample["image"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["INPUT.AUGMENTATION", "sdd"], "'sdd'; expected detectron2 or ssd"),
        (["INPUT.SQUARE_SIZE", 0], "INPUT.SQUARE_SIZE is 0"),
        (["INPUT.MASK_FORMAT", "polygon"], "'polygon'; expected bitmask, as INPUT.AUGMENTATION"),
        (["MODEL.MASK_ON", False], "MASK_ON is False; expected True, as INPUT.AUGMENTATION ssd"),
    ],
)
def test_keys_that_do_not_fit_the_pipeline_are_refused(overrides: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cfg_with(*overrides)
