"""Instances that are transformed together are those that Detectron2 transforms one by one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import instseg
from instseg.data.image_mapper import Mapper
from instseg.data.image_reader import ImageReader
from instseg.data.instances import transformed_masks
from instseg.data.mappers import build_train_mapper
from instseg.masks import CroppedMasks, encode

HEIGHT, WIDTH = 30, 40


def random_masks(seed: int, count: int) -> list[np.ndarray]:
    """Rectangles that overlap, blots of single pixels, and one that fills the image."""
    generator = np.random.default_rng(seed)
    masks = [np.ones((HEIGHT, WIDTH), dtype=np.bool_)]
    for number in range(count - 1):
        y, x = generator.integers(HEIGHT), generator.integers(WIDTH)
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
        mask[y : y + generator.integers(1, 20), x : x + generator.integers(1, 20)] = True
        masks.append(mask & (generator.random(mask.shape) < 0.5) if number % 3 == 0 else mask)
    return masks


def record_of(folder: Path, masks: list[np.ndarray]) -> dict[str, Any]:
    file = folder / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    annotations = [
        {
            "bbox": [0.3 + number, 0.7, 20.1 - number, 14.9],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": number % 3,
            "segmentation": encode(torch.from_numpy(mask)),
            "iscrowd": int(number == 2),
        }
        for number, mask in enumerate(masks)
    ]
    size = {"height": HEIGHT, "width": WIDTH}
    return {"file_name": str(file), "image_id": 1, **size, "annotations": annotations}


@pytest.mark.parametrize("recompute_boxes", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_sample_is_that_of_detectron2(tmp_path: Path, seed: int, recompute_boxes: bool) -> None:
    record = record_of(tmp_path, random_masks(seed, 12))
    settings: dict[str, Any] = {
        "is_train": True,
        "augmentations": [
            T.RandomCrop("absolute", (20, 24)),
            T.ResizeShortestEdge((17, 45), 90, "range"),
            T.RandomFlip(),
        ],
        "image_format": "BGR",
        "use_instance_mask": True,
        "instance_mask_format": "bitmask",
        "recompute_boxes": recompute_boxes,
    }
    given_record = copy.deepcopy(record)
    samples = []
    for kind in (DatasetMapper, Mapper):
        np.random.seed(seed)
        samples.append(kind(**settings)(record))
    assert record == given_record
    expected, sample = (sample["instances"] for sample in samples)
    assert torch.equal(sample.gt_boxes.tensor, expected.gt_boxes.tensor)
    assert torch.equal(sample.gt_classes, expected.gt_classes)
    assert torch.equal(sample.gt_masks.tensor, expected.gt_masks.tensor)
    assert torch.equal(samples[1]["image"], samples[0]["image"])
    assert samples[1].keys() == samples[0].keys()


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_masks_are_transformed_together_as_each_alone(seed: int, count: int) -> None:
    masks = random_masks(seed, count)
    np.random.seed(seed)
    image = T.AugInput(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    steps = [
        T.RandomFlip(),
        T.ResizeShortestEdge((11, 50), 90, "range"),
        T.RandomCrop("relative_range", (0.3, 0.3)),
        T.RandomRotation((-90, 90)),
    ]
    transforms = T.AugmentationList(steps)(image)
    numbers, together, boxes = transformed_masks(
        CroppedMasks.from_dense(torch.from_numpy(np.stack(masks))),
        transforms,
        image.image.shape[:2],
    )
    alone = np.stack([transforms.apply_segmentation(mask.astype(np.uint8)) for mask in masks])
    assert numbers.tolist() == np.flatnonzero(alone.any(axis=(1, 2))).tolist()
    assert np.array_equal(together.numpy(), alone[numbers])
    for mask, (x1, y1, x2, y2) in zip(together.numpy(), boxes, strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any()


def test_images_are_kept_until_the_room_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    for name in names:
        Image.fromarray(np.full((256, 1024, 3), 7, dtype=np.uint8)).save(name)
    opened: list[str] = []
    read_image = instseg.data.image_reader.read_image

    def count(path: str, **options: Any) -> Any:
        opened.append(path)
        return read_image(path, **options)

    monkeypatch.setattr("instseg.data.image_reader.read_image", count)
    read = ImageReader(cache_mib=1.5)  # two images of 0.75 MiB
    for _ in range(2):
        assert all((read(name) == 7).all() for name in names)
    assert opened == [*names, names[2]]
    with pytest.raises(ValueError, match="read-only"):
        read(names[0])[0] = 1


def test_a_sample_does_not_share_its_pixels_with_the_cache(tmp_path: Path) -> None:
    record = record_of(tmp_path, random_masks(0, 3))
    words = ["INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.FORMAT", "L"]
    words += ["MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0]]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)
    mapper = build_train_mapper(cfg, augment=True)
    first = mapper(record)["image"]
    kept = first.clone()
    first += 1
    assert torch.equal(mapper(record)["image"], kept)
