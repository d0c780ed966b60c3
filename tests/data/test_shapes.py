"""The synthetic data set: deterministic, as specified, and readable by everybody."""

import hashlib
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from pycocotools.coco import COCO

import instseg
from instseg.data.synthetic import shapes
from instseg.data.synthetic.outlines import rasterise
from instseg.errors import DatasetError

SAMPLE = range(0, 60)
EVERY_SPLIT = pytest.mark.parametrize("split", shapes.SPLITS)


def test_an_image_never_changes() -> None:
    """Trained weights and reported numbers are comparable only while the images stay."""
    digest = hashlib.sha256()
    for split in shapes.SPLITS:
        for index in (0, 1, 199):
            digest.update(np.packbits([shape.mask for shape in shapes.scene(split, index, 128)]))
    assert digest.hexdigest() == "e61490188ade56d7d5628f43d569d6d9b1464fa3bfecfe7d0a9bf5cdac871874"
    means = [shapes.image(split, 1, 128).mean() for split in shapes.SPLITS]
    np.testing.assert_allclose(means, [175.77, 105.50, 94.77, 101.53], atol=0.01)


def test_images_differ_between_splits_and_indices() -> None:
    images = {
        shapes.image(split, index, 64).tobytes() for split in shapes.SPLITS for index in range(5)
    }
    assert len(images) == 5 * len(shapes.SPLITS)


@EVERY_SPLIT
def test_a_scene_holds_as_many_instances_of_the_sizes_as_specified(split: str) -> None:
    hard = "hard" in split
    for index in SAMPLE:
        scene = shapes.scene(split, index, 128)
        assert 2 <= len(scene) <= (8 if hard else 6)
        for shape in scene:
            extent = (shape.outline.max(axis=0) - shape.outline.min(axis=0)).max()
            assert (14 if hard else 20) <= extent <= 64
            assert shape.kind < (4 if hard else 3)


@EVERY_SPLIT
def test_masks_are_disjoint_and_keep_two_fifths_of_their_area(split: str) -> None:
    for index in SAMPLE:
        scene = shapes.scene(split, index, 128)
        assert np.sum([shape.mask for shape in scene], axis=0).max() == 1
        for shape in scene:
            x, y = shape.outline.T
            whole = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
            assert shape.mask.sum() >= 0.4 * whole


@EVERY_SPLIT
def test_half_of_the_images_have_touching_instances_of_one_class(split: str) -> None:
    def touches(index: int) -> bool:
        scene = shapes.scene(split, index, 128)
        return any(
            a.kind == b.kind and (shapes._grow(a.mask) & b.mask).any()
            for i, a in enumerate(scene)
            for b in scene[:i]
        )

    assert [touches(index) for index in range(20)] == [True, False] * 10


def test_every_class_and_both_grey_and_coloured_images_occur() -> None:
    kinds = {
        shape.kind for index in SAMPLE for shape in shapes.scene("shapes_hard_val", index, 128)
    }
    assert kinds == {0, 1, 2, 3}
    grey = [np.ptp(shapes.image("shapes_val", index, 64), axis=2).max() == 0 for index in SAMPLE]
    assert 0.2 < np.mean(grey) < 0.6


def test_another_size_shows_the_same_scene() -> None:
    small, large = (shapes.scene("shapes_val", 7, size) for size in (128, 256))
    assert [shape.kind for shape in small] == [shape.kind for shape in large]
    for a, b in zip(small, large, strict=True):
        np.testing.assert_allclose(a.outline * 2, b.outline)


def test_a_rasterised_square_covers_exactly_its_pixels() -> None:
    mask = rasterise(np.array([[2.0, 3.0], [6.0, 3.0], [6.0, 5.0], [2.0, 5.0]]), 8)
    expected = np.zeros((8, 8), dtype=bool)
    expected[3:5, 2:6] = True
    assert np.array_equal(mask, expected)


def test_the_registered_set_is_read_by_detectron2_unchanged() -> None:
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    records = DatasetCatalog.get("shapes_val")
    assert len(records) == 200
    assert MetadataCatalog.get("shapes_val").thing_classes == ["circle", "square", "triangle"]
    sample = DatasetMapper(cfg, False)(records[3])
    image = shapes.image("shapes_val", 3, 128)
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), image[:, :, ::-1])


def test_the_size_of_the_images_is_a_config_key() -> None:
    instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", ["DATASETS.SHAPES_SIZE", 96])
    record = DatasetCatalog.get("shapes_val")[0]
    assert (record["height"], record["width"]) == (96, 96)
    assert read_image(record["file_name"], "BGR").shape == (96, 96, 3)
    instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    assert DatasetCatalog.get("shapes_val")[0]["height"] == 128


def test_an_export_is_read_by_pycocotools_and_holds_the_same_masks(tmp_path: Path) -> None:
    path = shapes.export("shapes_hard_val", tmp_path, limit=4)
    coco = COCO(str(path))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(shapes.KINDS)
    assert len(coco.imgs) == 4
    for index in coco.imgs:
        masks = [coco.annToMask(ann) for ann in coco.loadAnns(coco.getAnnIds(index))]
        scene = shapes.scene("shapes_hard_val", index, 128)
        assert np.array_equal(masks, [shape.mask for shape in scene])
        file = tmp_path / "shapes_hard_val" / coco.imgs[index]["file_name"]
        assert np.array_equal(
            read_image(str(file), "RGB"), shapes.image("shapes_hard_val", index, 128)
        )


def test_boxes_contain_their_masks() -> None:
    for record in shapes.load("shapes_val", 128, range(10)):
        for annotation in record["annotations"]:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            x, y, width, height = map(int, annotation["bbox"])
            assert mask[y : y + height, x : x + width].sum() == mask.sum() > 0


@pytest.mark.parametrize(
    ("split", "index"), [("shape_val", 0), ("shapes_val", 200), ("shapes_val", -1)]
)
def test_an_image_that_does_not_exist_is_refused_with_what_exists(split: str, index: int) -> None:
    with pytest.raises(DatasetError, match=r"shapes_val \(0\.\.199\)"):
        shapes.scene(split, index, 128)


def test_the_touching_and_the_other_images_of_a_split_make_up_the_whole() -> None:
    instseg.get_cfg()
    names = ("shapes_val_touching", "shapes_val_apart")
    touching, apart = ({r["image_id"]: r for r in DatasetCatalog.get(name)} for name in names)
    whole = {record["image_id"]: record for record in DatasetCatalog.get("shapes_val")}
    assert all(index % 2 == 0 for index in touching) and all(index % 2 for index in apart)
    assert {**touching, **apart} == whole
