"""Prediction tile by tile gives what is in the image, each instance once and whole."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from instseg import Predictor
from instseg.data.intensity import ModelImage
from instseg.data.regions import open_regions
from instseg.errors import ConfigError, ImageError
from instseg.inference.layout import Layout, Rect
from instseg.inference.tile_sources import TileSource, opened
from instseg.inference.tiles import CONTEXT, layout_of, predict_tiles
from instseg.masks import CroppedMasks
from instseg.predict.results import Results
from instseg.testing import PHOTO
from tests.inference.test_predictor import tiny_cfg
from tests.inference.test_stitching import box_of, scattered
from tests.support.tiles import Instance, as_set, straight_edges
from tests.test_systems import SYSTEMS, build

LARGE = np.random.default_rng(3).integers(0, 256, (26, 32, 3), dtype=np.uint8)
LARGE = LARGE.repeat(5, axis=0).repeat(5, axis=1)
"""(130, 160, 3) blots of 5 x 5 pixels: 3 x 3 tiles of 64 pixels that overlap by 16 or more."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(tiny_cfg("INPUT.MIN_SIZE_TEST", 0))


def drawn(ground_truth: list[Instance], height: int, width: int) -> np.ndarray:
    """An image of numbers, two bytes each: 0 or 1 + the index of an instance."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, (x, y, mask) in enumerate(ground_truth, start=1):
        part = image[y : y + mask.shape[0], x : x + mask.shape[1]]
        part[mask] = number % 256, number // 256, 0
    return image


class Exact:
    """In place of a predictor: finds the instances of :func:`drawn` in a tile without an error."""

    def __init__(self, cfg: Any = None, fail_after: int | None = None) -> None:
        self.cfg = cfg or tiny_cfg("INPUT.MIN_SIZE_TEST", 0)
        self.largest_instance = None
        self.fail_after = fail_after

    def stream(
        self, images: Iterable[ModelImage | np.ndarray], masks: str = "cropped"
    ) -> Iterator[dict[str, Any]]:
        assert masks == "cropped"
        for number, image in enumerate(images):
            if number == self.fail_after:
                raise KeyboardInterrupt
            pixels = getattr(image, "pixels", image).astype(np.int64)
            labels = pixels[:, :, 0] + 256 * pixels[:, :, 1]
            numbers = np.unique(labels[labels > 0])
            masks = torch.from_numpy(labels == numbers[:, None, None])
            instances = Instances(labels.shape, pred_masks=CroppedMasks.from_dense(masks))
            instances.pred_boxes = Boxes(instances.pred_masks.boxes.float())
            # The same in all tiles, and no two alike.
            instances.scores = torch.from_numpy(1 - numbers / 1000).float()
            instances.pred_classes = torch.from_numpy(numbers % 2)
            yield {"instances": instances}


def crops(masks: CroppedMasks) -> list[Instance]:
    return [masks.crop(index) for index in range(len(masks))]


def of_array(image: np.ndarray) -> TileSource:
    with opened(image, tiny_cfg()) as source:
        return source


def test_tiles_of_an_exact_predictor_give_the_ground_truth_best_first() -> None:
    ground_truth = scattered(0, 130, 160)
    layout = Layout(130, 160, 64, 24)
    assert len(layout) == 12
    instances = predict_tiles(Exact(), of_array(drawn(ground_truth, 130, 160)), layout)
    stitched = crops(instances.pred_masks)
    assert as_set(stitched) == as_set(ground_truth)
    assert straight_edges(stitched, layout) == straight_edges(ground_truth, layout)
    assert instances.image_size == instances.pred_masks.image_size == (130, 160)
    numbers = (1000 * (1 - instances.scores)).round().long()
    assert numbers.tolist() == list(range(1, len(ground_truth) + 1)), "not best first"
    assert torch.equal(instances.pred_classes, numbers % 2)
    assert torch.equal(instances.pred_boxes.tensor, instances.pred_masks.boxes.float())


def test_what_is_larger_than_a_tile_is_joined_and_has_its_box() -> None:
    mask = np.ones((100, 140), bool)
    mask[30:60, 40:90] = False
    source = of_array(drawn([(10, 20, mask)], 130, 160))
    instances = predict_tiles(Exact(), source, Layout(130, 160, 64, 16))
    assert as_set(crops(instances.pred_masks)) == as_set([(10, 20, mask)])
    assert instances.pred_boxes.tensor.tolist() == [[10, 20, 150, 120]]


def test_an_image_without_instances_gives_none() -> None:
    instances = predict_tiles(
        Exact(), of_array(np.zeros((130, 160, 3), np.uint8)), Layout(130, 160, 64, 16)
    )
    assert len(instances) == len(instances.pred_masks) == 0


def test_an_image_that_fits_into_a_tile_is_predicted_as_without_tiles(
    predictor: Predictor,
) -> None:
    expected = predictor(PHOTO)["instances"]
    instances = predictor.predict_tiled(PHOTO, 64)["instances"]
    filled = expected.pred_masks.flatten(1).any(dim=1)
    assert torch.equal(instances.pred_masks.to_dense(), expected.pred_masks[filled])
    assert torch.equal(instances.scores, expected.scores[filled])
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor[filled])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_predicts_by_tiles_what_it_finds_in_each(name: str) -> None:
    """3 x 3 tiles; what only one tile sees is what that tile gives, and the rest is stitched."""
    system = build(name)
    instances = system.predict_tiled(LARGE, 64, 16, progress=False)["instances"]
    layout = Layout(130, 160, 64, 16)
    assert len(layout) == 9
    assert instances.pred_masks.image_size == (130, 160)
    assert bool((instances.scores[:-1] >= instances.scores[1:]).all())
    alone = []
    for rect in layout.rects:
        tile = system(LARGE[rect.y0 : rect.y1, rect.x0 : rect.x1])["instances"]
        masks = CroppedMasks.from_dense(tile.pred_masks).shifted(rect.x0, rect.y0, (130, 160))
        whole = [x for x in crops(masks) if x[2].size]
        alone += [x for x in whole if not layout.is_shared(box_of(x))]
    stitched = crops(instances.pred_masks)
    assert as_set([x for x in stitched if not layout.is_shared(box_of(x))]) == as_set(alone)
    assert len(stitched) > 1


def test_tiles_are_predicted_in_batches() -> None:
    many = build("mask_rcnn/mask_rcnn_shapes.yaml")
    sizes: list[int] = []
    many.model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    many.predict_tiled(LARGE, 64, 16, progress=False)
    assert sizes == [8, 1]


def test_a_file_is_read_by_parts_as_it_is_whole(predictor: Predictor, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "large.tif", LARGE[:, :, ::-1], tile=(32, 32), photometric="rgb")
    parts: list[tuple[int, ...]] = []
    with open_regions(tmp_path / "large.tif") as regions:
        read = regions.read
        regions.read = lambda *part: (parts.append(part), read(*part))[1]  # type: ignore[method-assign]
        instances = predictor.predict_tiled(regions, 64, 16, progress=False)["instances"]
    layout = Layout(130, 160, 64, 16)
    assert [(x0, y0, x1, y1) for y0, y1, x0, x1 in parts[1:]] == layout.rects
    for image in (LARGE, tmp_path / "large.tif"):
        other = predictor.predict_tiled(image, 64, 16, progress=False)["instances"]
        assert as_set(crops(instances.pred_masks)) == as_set(crops(other.pred_masks))
        assert torch.equal(instances.scores, other.scores)


def test_intensities_are_those_of_the_image_not_of_the_tile(tmp_path: Path) -> None:
    """A corner with the one bright spot and one without get the same numbers."""
    image = np.full((130, 160), 100, np.uint16)
    image[:20, :20] = 5000
    for settings, background in (
        (("INPUT.NORMALIZE", "range", "INPUT.NORMALIZE_RANGE", (0.0, 1000.0)), 26),
        (("INPUT.NORMALIZE", "percentile", "INPUT.NORMALIZE_RANGE", (0.0, 100.0)), 0),
    ):
        cfg = tiny_cfg(*settings)
        with opened(image, cfg) as source:
            far = source.read(Layout(130, 160, 64, 16).rects[-1]).pixels
            near = source.read(Layout(130, 160, 64, 16).rects[0]).pixels
        assert (far == background).all()
        assert (near[30:, 30:] == background).all() and (near[:20, :20] == 255).all()
    with pytest.raises(ImageError, match="INPUT.NORMALIZE percentile"), opened(image, tiny_cfg()):
        pass


def test_a_dark_tile_of_floats_is_no_image_of_0_to_1(predictor: Predictor) -> None:
    image = LARGE.astype(np.float32)
    image[:70, :70] = 0.5
    assert predictor.predict_tiled(image, 64, 16, progress=False)["instances"].image_size == (
        130,
        160,
    )


def test_an_array_of_too_many_pixels_is_to_be_a_file(predictor: Predictor) -> None:
    image = np.broadcast_to(PHOTO[:1, :1], (16_384, 16_384, 3))
    with pytest.raises(ImageError, match="save it as a TIFF with tiles and pass its path"):
        predictor.predict_tiled(image)


@pytest.mark.parametrize(
    ("largest", "tile", "overlap", "message"),
    [
        (None, 64, 8, "the weights do not say how large"),
        (10, 96, 10 + 2 * CONTEXT, "the longest side of an instance in training, 10, and 16"),
        (100, 64, 32, "half a tile, as the longest side of an instance in training is 100"),
    ],
)
def test_the_overlap_follows_from_the_largest_instance_of_the_training(
    largest: int | None, tile: int, overlap: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    exact = Exact()
    exact.largest_instance = largest
    with caplog.at_level(logging.INFO, "instseg"):
        layout = layout_of(exact, of_array(LARGE), tile, None)
    assert layout.overlap == overlap
    assert message in caplog.text


def test_the_size_that_tiles_are_resized_to_is_told(caplog: pytest.LogCaptureFixture) -> None:
    source, layout = of_array(np.zeros((130, 160, 3), np.uint8)), Layout(130, 160, 64, 16)
    with caplog.at_level(logging.INFO, "instseg"):
        predict_tiles(Exact(tiny_cfg("INPUT.MIN_SIZE_TEST", 32)), source, layout)
    assert "every tile of 64x64 pixels is resized to 32x32 (INPUT.MIN_SIZE_TEST 32)" in caplog.text


def test_a_tile_with_as_many_instances_as_it_may_have_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = of_array(drawn(scattered(0, 130, 160), 130, 160))
    for limit in (1000, 9):
        with caplog.at_level(logging.WARNING, "instseg"):
            exact = Exact(tiny_cfg("TEST.DETECTIONS_PER_IMAGE", limit))
            predict_tiles(exact, source, Layout(130, 160, 64, 24))
        assert ("a tile has the 9 instances that TEST" in caplog.text) == (limit == 9)


@pytest.mark.parametrize(("tile", "overlap"), [(0, None), (64, 64), (64, -1)])
def test_tiles_that_cannot_be_are_refused(
    predictor: Predictor, tile: int, overlap: int | None
) -> None:
    with pytest.raises(ConfigError, match="expected"):
        predictor.predict_tiled(PHOTO, tile, overlap)


def test_a_value_that_is_no_number_outside_the_sample_is_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.zeros((4608, 4608), np.float32)
    pixels[520:580, 520:580] = np.nan  # between the squares that the percentiles are from
    tifffile.imwrite(tmp_path / "a.tif", pixels + np.arange(4608, dtype=np.float32))
    cfg = tiny_cfg("INPUT.NORMALIZE", "percentile")
    with opened(tmp_path / "a.tif", cfg) as source:
        source.read(Rect(0, 0, 64, 64))
        with pytest.raises(ImageError, match="contains non-finite values"):
            source.read(Rect(516, 516, 580, 580))


def test_tiles_without_instances_keep_the_scores_of_classes(tmp_path: Path) -> None:
    results = Results(Predictor(tiny_cfg()), tmp_path, 0.0, False, False, rank_by_mask=True)
    kept = []
    for count in (1, 0):
        instances = Instances((8, 8), scores=torch.ones(count), mask_scores=torch.ones(count))
        kept.append(results.keep(instances))
    assert len(Instances.cat(kept).class_scores) == 1
