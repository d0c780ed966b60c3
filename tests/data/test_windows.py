"""Crops, rotations, changes of scale and symmetries: what they do to images, boxes and masks."""

import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import instseg
from instseg.data.flow import transform_flow
from instseg.data.image_mapper import Mapper, SSDMapper
from instseg.data.mappers import build_train_mapper
from instseg.data.windows import RandomDihedral, RandomWindow, SymmetryTransform, WindowTransform
from instseg.errors import ConfigError

DETECTRON2 = "mask_rcnn/mask_rcnn_nuclei.yaml"
SSD = "yolact/yolact_nuclei.yaml"
OFF: dict[str, Any] = {
    "INPUT.CROP.AROUND_INSTANCES": 0.0,
    "INPUT.RANDOM_DIHEDRAL": False,
    "INPUT.RANDOM_SCALE": (1.0, 1.0),
    "INPUT.RANDOM_GAMMA": (1.0, 1.0),
    "INPUT.RANDOM_BLUR": (0.0, 0.0),
    "INPUT.RANDOM_NOISE": (0.0, 0.0),
}
"""What the configurations themselves vary."""
ON: dict[str, Any] = {
    "INPUT.RANDOM_DIHEDRAL": True,
    "INPUT.RANDOM_ROTATION": (-180.0, 180.0),
    "INPUT.RANDOM_SCALE": (0.6, 1.7),
    "INPUT.RANDOM_GAMMA": (0.5, 2.0),
    "INPUT.RANDOM_CONTRAST": (0.5, 1.5),
    "INPUT.RANDOM_BLUR": (0.0, 1.0),
    "INPUT.RANDOM_NOISE": (0.0, 5.0),
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)


def test_the_eight_symmetries_are_drawn_equally_often_and_move_pixels_only() -> None:
    image = noise(3, 4)
    turned = [np.rot90(x, k) for x in (image, image[:, ::-1]) for k in range(4)]
    expected = {x.shape + tuple(x.ravel()) for x in turned}
    counts = dict.fromkeys(expected, 0)
    for _ in range(800):
        given = RandomDihedral().get_transform(image).apply_image(image)
        counts[given.shape + tuple(given.ravel())] += 1
    assert len(counts) == 8 and min(counts.values()) > 60


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_a_symmetry_permutes_the_pixels_of_a_mask_and_its_box_stays_tight(
    seed: int, height: int, width: int
) -> None:
    np.random.seed(seed)
    mask = np.random.random((height, width)) < 0.4
    transform = RandomDihedral().get_transform(mask)
    moved = transform.apply_segmentation(mask)
    assert moved.sum() == mask.sum()
    if mask.any():
        assert transform.apply_box(tight(mask)[None])[0].tolist() == tight(moved).tolist()
    centres = np.argwhere(mask)[:, ::-1] + 0.5
    for x, y in transform.apply_coords(centres):
        assert moved[int(y), int(x)]


def tight(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)


def test_a_window_turned_by_90_degrees_is_the_rotated_image() -> None:
    image = noise(6, 8)
    window = WindowTransform((4, 3), 90, 1, (8, 6))
    np.testing.assert_array_equal(window.apply_image(image), np.rot90(image))
    np.testing.assert_array_equal(window.apply_segmentation(image[..., 0]), np.rot90(image[..., 0]))


def test_a_window_enlarges_around_its_centre_and_has_its_colour_outside() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[4:6, 4:6] = 1
    window = WindowTransform((5, 5), 0, 2, (8, 8))
    assert tight(window.apply_segmentation(mask)).tolist() == [2, 2, 6, 6]
    assert window.apply_box(np.array([[4, 4, 6, 6]])).tolist() == [[2, 2, 6, 6]]
    outside = WindowTransform((-50, 5), 0, 2, (8, 8), (7, 8, 9)).apply_image(noise(10, 10))
    assert (outside == (7, 8, 9)).all()


def test_an_image_of_one_channel_stays_one() -> None:
    assert WindowTransform((4, 3), 30, 1, (5, 7)).apply_image(noise(6, 8, 1)).shape == (5, 7, 1)


@settings(max_examples=40, deadline=None)
@given(
    angle=st.floats(-180, 180),
    scale=st.floats(0.5, 2),
    centre=st.tuples(st.floats(0, 60), st.floats(0, 40)),
)
def test_masks_polygons_and_boxes_move_alike(
    angle: float, scale: float, centre: tuple[float, float]
) -> None:
    """The box of the moved mask is that of the moved outline, clipped, up to some pixels.

    A border that cuts an edge at a flat angle makes more of the pixel by which both differ.
    """
    pytest.importorskip("shapely")
    outline = np.array([[20.0, 10], [40, 12], [36, 30], [22, 26]])
    mask = np.zeros((40, 60), np.uint8)
    cv2.fillPoly(mask, [np.rint(outline * 16 - 8).astype(int)], 1, shift=4)
    window = WindowTransform(centre, angle, scale, (32, 48))
    moved = window.apply_segmentation(mask)
    assert moved.shape == (32, 48)
    parts = window.apply_polygons([outline])
    # What lies at the border may be less than a pixel.
    if moved.sum() > 100 and parts:
        points = np.concatenate(parts)
        corners = np.concatenate([points.min(0), points.max(0)])
        np.testing.assert_allclose(tight(moved), corners, atol=5)


def test_the_flow_follows_a_window_and_a_transposition() -> None:
    flow = np.zeros((10, 12, 2), np.float32) + np.array([3, 1], np.float32)
    turned = transform_flow(flow, T.TransformList([WindowTransform((6, 5), 90, 2, (8, 8))]))
    np.testing.assert_allclose(turned, np.zeros((8, 8, 2)) + [2, -6], atol=1e-5)
    outside = transform_flow(flow, T.TransformList([WindowTransform((0, 5), 0, 1, (8, 8))]))
    assert np.isnan(outside[:, :4]).all() and not np.isnan(outside[:, 4:]).any()


@pytest.mark.parametrize("choices", itertools.product([False, True], repeat=3))
def test_the_flow_follows_every_symmetry(choices: tuple[bool, bool, bool]) -> None:
    """The arrow of a flow ends where the moved end of the old arrow lies."""
    transpose, mirror_x, mirror_y = choices
    flow = np.random.default_rng(0).uniform(-3, 3, (4, 5, 2)).astype(np.float32)
    symmetry = SymmetryTransform((4, 5), transpose=transpose, mirror_x=mirror_x, mirror_y=mirror_y)
    moved = transform_flow(flow, T.TransformList([symmetry]))
    rows, columns = np.mgrid[:4, :5]
    start = np.stack([columns, rows], axis=2).reshape(-1, 2) + 0.5
    new_start, new_end = map(symmetry.apply_coords, (start, start + flow.reshape(-1, 2)))
    x, y = new_start.astype(int).T
    np.testing.assert_allclose(new_start + moved[y, x], new_end, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop=st.integers(1, 70),
    turned=st.booleans(),
    point=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_crop_around_an_instance_has_its_centre_inside(
    seed: int, size: tuple[int, int], crop: int, turned: bool, point: tuple[float, float]
) -> None:
    np.random.seed(seed)
    height, width = size
    boxes = np.array([[*point, *point]]) * [width, height, width, height]
    changes: dict[str, Any] = {"rotation": (-180, 180), "scale": (0.5, 2)} if turned else {}
    window = RandomWindow(crop=T.RandomCrop("absolute", (crop, crop)), around=1.0, **changes)
    transform = window.get_transform(np.zeros((height, width, 3)), boxes)
    cut = transform.apply_image(np.zeros((height, width, 3), np.uint8))
    assert cut.shape[:2] == (min(crop, height), min(crop, width))
    ((x, y),) = transform.apply_coords(boxes[:, :2].copy())
    assert 0 <= x <= cut.shape[1] and 0 <= y <= cut.shape[0]


def test_crops_around_instances_reach_all_of_them_and_any_place_of_the_window() -> None:
    boxes = np.array([[10.0, 10, 12, 12], [80, 40, 90, 44]])
    window = RandomWindow(crop=T.RandomCrop("absolute", (20, 20)), around=1.0)
    points = [
        window.get_transform(np.zeros((60, 100, 3)), boxes).apply_coords(np.array([[85.0, 42]]))[0]
        for _ in range(300)
    ]
    inside = np.array([x for x in points if (x >= 0).all() and (x <= 20).all()])
    assert 100 < len(inside) < 200
    assert inside.min() < 3 and inside.max() > 17


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), angle=st.sampled_from([0, 30, 90]))
def test_a_crop_that_fits_lies_inside_of_the_image(seed: int, angle: int) -> None:
    np.random.seed(seed)
    crop = T.RandomCrop("absolute", (20, 30))
    window = RandomWindow(crop=crop, rotation=(angle, angle), scale=(0.9, 1.5), color=(0, 0, 0))
    cut = window.get_transform(noise(80, 80), None).apply_image(noise(80, 80))
    assert cut.shape == (20, 30, 3) and cut.min() > 0


def test_empty_corners_have_the_median_of_the_image() -> None:
    image = np.full((40, 40, 3), (20, 30, 40), np.uint8)
    image[10:20, 10:20] = 255
    turned = RandomWindow(rotation=(45, 45)).get_transform(image, None).apply_image(image)
    assert turned[0, 0].tolist() == [20, 30, 40]


def ellipses(folder: Path, count: int = 6) -> dict[str, Any]:
    """A record of an image with bright ellipses, which may touch, and their masks."""
    random = np.random.default_rng(3)
    pixels = np.zeros((120, 150, 3), np.uint8)
    annotations = []
    for _ in range(count):
        mask = np.zeros(pixels.shape[:2], np.uint8)
        centre = tuple(int(x) for x in random.integers(20, 100, 2))
        cv2.ellipse(mask, centre, (14, 7), float(random.integers(180)), 0, 360, 1, -1)
        pixels[mask > 0] = 200
        box = tight(mask > 0)
        annotations.append(
            {
                "bbox": box.tolist(),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": mask_util.encode(np.asfortranarray(mask)),
            }
        )
    path = folder / "ellipses.png"
    Image.fromarray(pixels).save(path)
    return {"file_name": str(path), "height": 120, "width": 150, "annotations": annotations}


def config(file: str, changes: dict[str, Any]) -> Any:
    ssd = {"INPUT.AUGMENTATION": "ssd", "INPUT.SSD_EXPAND_RATIO": 1.0} if file == SSD else {}
    words = list(itertools.chain.from_iterable((OFF | ssd | changes).items()))
    return instseg.load_cfg(file, words)


EVERY = [{}, *({key: value} for key, value in ON.items()), ON]


@pytest.mark.parametrize("changes", EVERY, ids=lambda x: "+".join(x)[:40] or "off")
@pytest.mark.parametrize("file", [DETECTRON2, SSD])
def test_masks_boxes_and_pixels_agree_after_every_augmentation(
    file: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Bright pixels are those of instances; boxes are tight if the image was turned."""
    changes = {"INPUT.RANDOM_BRIGHTNESS": (1.0, 1.0), **changes}
    if file == SSD:
        changes["INPUT.SSD_COLORS"] = False
    else:
        changes |= {"INPUT.CROP.AROUND_INSTANCES": 1.0, "INPUT.CROP.SIZE": [64, 64]}
    mapper = build_train_mapper(config(file, changes), augment=True)
    record = ellipses(tmp_path)
    for _ in range(8):
        sample = mapper(record)
        image, instances = sample["image"].float().mean(dim=0), sample["instances"]
        assert len(instances) > 0 and image.shape == instances.image_size
        masks = instances.gt_masks.tensor
        assert masks.shape[1:] == image.shape
        boxes, around = instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor
        if file == DETECTRON2 or "INPUT.RANDOM_ROTATION" in changes:
            assert (boxes == around).all()
        else:
            assert (boxes[:, :2] <= around[:, :2] + 2).all()
            assert (boxes[:, 2:] >= around[:, 2:] - 2).all()
        inside = cv2.erode(masks.any(dim=0).numpy().astype(np.uint8), np.ones((5, 5))) > 0
        outside = cv2.dilate(masks.any(dim=0).numpy().astype(np.uint8), np.ones((7, 7))) == 0
        if inside.any() and outside.any():
            assert image[inside].min() > image[outside].median() + 30


def test_every_kind_of_flip_may_follow_a_symmetry(tmp_path: Path) -> None:
    flip = {"INPUT.RANDOM_FLIP": "vertical", "INPUT.MIN_SIZE_TRAIN": (0,)}
    mapper = build_train_mapper(
        config(DETECTRON2, {"INPUT.RANDOM_DIHEDRAL": True, **flip}), augment=True
    )
    for _ in range(8):
        assert len(mapper(ellipses(tmp_path))["instances"]) == 6


@pytest.mark.parametrize("file", [DETECTRON2, SSD])
def test_an_image_without_instances_is_augmented_too(file: str, tmp_path: Path) -> None:
    record = {**ellipses(tmp_path), "annotations": []}
    sample = build_train_mapper(config(file, ON), augment=True)(record)
    assert len(sample["instances"]) == 0


def test_a_semantic_map_moves_with_the_image(tmp_path: Path) -> None:
    record = ellipses(tmp_path)
    labels = mask_util.decode([x["segmentation"] for x in record["annotations"]]).any(axis=2)
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels.png")
    mapper = build_train_mapper(config(DETECTRON2, ON), augment=True)
    for _ in range(5):
        sample = mapper({**record, "sem_seg_file_name": str(tmp_path / "labels.png")})
        masks = sample["instances"].gt_masks.tensor
        assert (sample["sem_seg"].bool() == masks.any(dim=0)).all()


def test_without_these_keys_no_random_number_is_drawn_and_the_steps_are_detectron2s() -> None:
    mapper = build_train_mapper(config(DETECTRON2, {}), augment=True).mapper
    assert type(mapper) is Mapper
    kinds = [type(step).__name__ for step in mapper.augmentations.augs]
    assert kinds == ["RandomCrop", "ResizeShortestEdge", "RandomFlip", "RandomBrightness"]
    ssd = build_train_mapper(config(SSD, {}), augment=True).mapper
    assert isinstance(ssd, SSDMapper) and not ssd.recompute_boxes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INPUT.RANDOM_ROTATION": (10.0, -10.0)}, "smallest, largest. angle"),
        ({"INPUT.RANDOM_SCALE": (0.0, 1.0)}, "factor, above 0"),
        ({"INPUT.RANDOM_BLUR": (-1.0, 1.0)}, "pixels"),
        ({"INPUT.RANDOM_NOISE": (0.0,)}, "standard deviation"),
        ({"INPUT.RANDOM_GAMMA": (0.0, 1.0)}, "exponent, above 0"),
        ({"INPUT.CROP.AROUND_INSTANCES": 1.5}, "from 0 to 1"),
        ({"INPUT.RANDOM_DIHEDRAL": True, "MODEL.KEYPOINT_ON": True}, "False with keypoints"),
        ({"INPUT.CROP.AROUND_INSTANCES": 0.5, "INPUT.CROP.ENABLED": False}, "0 without crops"),
        ({"INPUT.RANDOM_ROTATION": (0.0, 9.0), "MODEL.MASK_ON": False}, "without masks"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(DETECTRON2, changes)
