"""Patches for DeepMask's two heads, drawn from images with known content."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from torch.utils.data import DataLoader

import instseg
from instseg.data.samples import build_sample_loader
from instseg.data.synthetic import shapes
from instseg.data.windows import RandomDihedral, RandomWindow
from instseg.errors import ConfigError, DatasetError, ImageError
from instseg.projects.deepmask.data import PatchSamples
from instseg.projects.deepmask.inference import FILL
from instseg.projects.deepmask.patches import Rules

RULES = Rules(64, 8, 32, mask_size=64, shift=8.0, scale_jitter=0.25)
Box = tuple[int, int, int, int]


def annotation(box: Box, **changes: Any) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {
        "bbox": list(box),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
        "iscrowd": 0,
        **changes,
    }


def as_rle(box: Box, size: tuple[int, int]) -> dict[str, Any]:
    mask = np.zeros(size, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask_util.encode(np.asfortranarray(mask))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.random.seed(0)
    return tmp_path


def record(
    folder: Path, *annotations: dict[str, Any], size: tuple[int, int] = (96, 128)
) -> dict[str, Any]:
    """A black image with its instances in white."""
    pixels = np.zeros((*size, 3), np.uint8)
    for item in annotations:
        x1, y1, x2, y2 = map(int, item["bbox"])
        pixels[y1:y2, x1:x2] = 255
    path = folder / f"{len(list(folder.iterdir()))}.png"
    cv2.imwrite(str(path), pixels)
    return {
        "file_name": str(path),
        "height": size[0],
        "width": size[1],
        "image_id": path.stem,
        "annotations": list(annotations),
    }


def draw(records: list[dict[str, Any]], count: int, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "rules": RULES,
        "score_fraction": 0.5,
        "flip": True,
        "image_format": "RGB",
    }
    return list(itertools.islice(PatchSamples(records, **{**settings, **changes}), count))


def test_a_mask_sample_shows_its_instance_where_its_mask_says(folder: Path) -> None:
    records = [record(folder, annotation((20, 30, 60, 45)), annotation((90, 50, 110, 90)))]
    lonely = [record(folder, annotation((20, 30, 60, 45)))]
    for sample in draw(lonely, 20, score_fraction=0.0):
        assert sample["head"] == "mask"
        assert sample["image"].shape == (3, 80, 80) and sample["image"].dtype == torch.float32
        assert sample["gt_mask"].shape == (64, 64) and sample["gt_mask"].dtype == torch.float32
        # The mask covers the image without its context; both are resampled alike.
        assert torch.equal(sample["image"][0, 8:-8, 8:-8] > 128, sample["gt_mask"] == 1)
        assert set(sample["gt_mask"].unique().tolist()) == {-1.0, 1.0}
    areas = {int((x["gt_mask"] > 0).sum()) for x in draw(records, 20, score_fraction=0.0)}
    assert max(areas) < 32 * 2**0.25 * 32  # never both instances


def test_the_context_and_the_outside_are_half_grey(folder: Path) -> None:
    records = [record(folder, annotation((0, 0, 40, 40)))]
    rules = Rules(patch_size=64, context=8, object_size=32, mask_size=16, shift=0, scale_jitter=0)
    (sample,) = draw(records, 1, rules=rules, score_fraction=0.0, flip=False)
    # 40 pixels become 32, so the window begins 30 pixels beside the image, at new pixel 24 of 80.
    assert sample["image"][:, :24].unique().tolist() == [127.5]
    assert sample["image"][:, 25:55, 25:55].unique().tolist() == [255.0]
    # Without the context the instance covers 32 of 64, from 16 to 48: cells 4 to 11 of 16.
    expected = torch.full((16, 16), -1.0)
    expected[4:12, 4:12] = 1
    assert torch.equal(sample["gt_mask"], expected)


def test_categories_are_drawn_evenly(folder: Path) -> None:
    rare = record(folder, annotation((20, 20, 60, 60), category_id=7))
    common = [record(folder, annotation((20, 20, 60, 60), category_id=2)) for _ in range(9)]
    names = Counter(x["file_name"] for x in draw([rare, *common], 200, score_fraction=0.0))
    assert 70 < names[rare["file_name"]] < 130


def test_a_positive_is_centred_and_a_negative_is_not(folder: Path) -> None:
    samples = draw([record(folder, annotation((40, 30, 76, 66)))], 200, score_fraction=1.0)
    for sample in samples:
        assert sample["head"] == "score" and sample["label"] in (1.0, -1.0)
        if sample["label"] > 0:
            # 36 of 32 pixels is scale 0: the patch is the image, the instance in its middle.
            assert (sample["image"][:, 22:58, 22:58] == 255).all()
            assert not (sample["image"][:, 21] == 255).any()
    assert 70 < sum(sample["label"] > 0 for sample in samples) < 130


def test_the_heads_take_turns_batch_by_batch_as_often_as_asked(folder: Path) -> None:
    heads = [x["head"] for x in draw([record(folder, annotation((20, 20, 60, 60)))], 400)]
    batches = [heads[i : i + 4] for i in range(0, 400, 4)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert 30 < sum(batch[0] == "mask" for batch in batches) < 70


@pytest.mark.parametrize(("fraction", "heads"), [(0.0, {"mask"}), (1.0, {"score"})])
def test_one_head_may_get_every_batch(folder: Path, fraction: float, heads: set[str]) -> None:
    records = [record(folder, annotation((20, 20, 60, 60)))]
    assert {x["head"] for x in draw(records, 60, score_fraction=fraction)} == heads


def test_heads_do_not_depend_on_the_process_that_draws(folder: Path) -> None:
    samples = PatchSamples(
        [record(folder, annotation((20, 20, 60, 60)))],
        batch_size=3,
        rules=RULES,
        score_fraction=0.5,
        flip=True,
        image_format="RGB",
    )
    alone = [sample["head"] for sample in itertools.islice(samples, 0, 36, 3)]
    loader = DataLoader(samples, batch_size=3, num_workers=2, collate_fn=list)
    batches = list(itertools.islice(loader, 12))
    assert [batch[0]["head"] for batch in batches] == alone
    assert all(len({sample["head"] for sample in batch}) == 1 for batch in batches)


def test_polygons_and_both_kinds_of_rle_give_the_same_patches(folder: Path) -> None:
    box = (20, 20, 60, 50)
    rle = as_rle(box, (96, 128))
    plain = {"size": [96, 128], "counts": [20 * 96 + 20, *([30, 66] * 39), 30, 67 * 96 + 46]}
    drawn = []
    for segmentation in (annotation(box)["segmentation"], rle, plain):
        np.random.seed(1)
        item = record(folder, annotation(box, segmentation=segmentation))
        drawn.append(draw([item], 4, score_fraction=0.0))
    for first, *others in zip(*drawn, strict=True):
        for other in others:
            assert torch.equal(first["gt_mask"], other["gt_mask"])


def test_without_flips_the_left_stays_left(folder: Path) -> None:
    item = annotation((20, 20, 60, 60), segmentation=[[20, 20, 40, 20, 40, 60, 20, 60]])

    def on_the_left(flip: bool) -> Counter[bool]:
        rules = dataclasses.replace(RULES, shift=0.0)
        records = [record(folder, item)]
        samples = draw(records, 60, score_fraction=0.0, flip=flip, rules=rules)
        masks = [sample["gt_mask"] > 0 for sample in samples]
        return Counter(bool(m[:, :32].sum() > m[:, 32:].sum()) for m in masks)

    assert on_the_left(False) == {True: 60}
    assert 15 < on_the_left(True)[True] < 45


def test_crowds_and_small_instances_teach_no_mask(folder: Path) -> None:
    good = record(folder, annotation((20, 20, 60, 60)))
    crowd = record(folder, annotation((20, 20, 60, 60), iscrowd=1))
    small = record(folder, annotation((20, 20, 29, 30)))
    empty = record(folder)
    samples = draw([crowd, good, small, empty], 50, score_fraction=0.0)
    assert {sample["file_name"] for sample in samples} == {good["file_name"]}


def test_small_instances_are_scored_and_crowds_are_not(folder: Path) -> None:
    good = record(folder, annotation((20, 20, 60, 60)))
    crowd = record(folder, annotation((20, 20, 60, 60), iscrowd=1))
    small = record(folder, annotation((20, 20, 29, 30)))
    samples = draw([crowd, good, small], 60, score_fraction=1.0)
    positives = {sample["file_name"] for sample in samples if sample["label"] > 0}
    assert positives == {good["file_name"], small["file_name"]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"iscrowd": 1}, "1 are crowds"),
        ({"segmentation": []}, "1 have no mask"),
        ({"bbox": [20, 20, 24, 60]}, "the others are too small"),
    ],
)
def test_data_without_a_usable_instance_are_refused(
    folder: Path, changes: dict[str, Any], problem: str
) -> None:
    item = annotation((20, 20, 60, 60), **changes)
    with pytest.raises(DatasetError, match=f"of 1 annotations in 1 images.*{problem}"):
        draw([record(folder, item)], 1)


def test_data_without_annotations_are_refused(folder: Path) -> None:
    with pytest.raises(DatasetError, match="of 0 annotations in 1 images"):
        draw([{**record(folder), "annotations": []}], 1, score_fraction=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": [[1, 2, 3]]},
        {"segmentation": {"size": [96, 128]}},
        {"segmentation": {"size": [96, 128], "counts": 3}},
        {"bbox": ["wide"]},
    ],
)
def test_a_malformed_annotation_names_its_image(folder: Path, changes: dict[str, Any]) -> None:
    item = record(folder, annotation((20, 20, 60, 60)))
    item["annotations"][0].update(changes)
    with pytest.raises(DatasetError, match=r"an annotation of .*0\.png cannot be used"):
        draw([item], 1)


def test_a_mask_of_another_size_than_its_image_is_refused(folder: Path) -> None:
    item = annotation((20, 20, 60, 60), segmentation=as_rle((20, 20, 60, 60), (128, 96)))
    with pytest.raises(DatasetError, match="96 rows and 128 columns.* has 128 and 96"):
        draw([record(folder, item)], 1, score_fraction=0.0)


def test_a_damaged_image_is_named(folder: Path) -> None:
    broken = record(folder, annotation((20, 20, 60, 60)))
    path = Path(broken["file_name"])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=path.name):
        draw([broken], 1)


def test_images_too_full_for_a_negative_end_in_an_error(folder: Path) -> None:
    boxes = [(4 - m / 2, 4 - m / 2, 4 + m / 2, 4 + m / 2) for m in (9, 34, 140)]
    items = [annotation((0, 0, 8, 8), bbox=list(box)) for box in boxes]
    with pytest.raises(DatasetError, match="no window without an instance was found in 100 images"):
        draw([record(folder, *items, size=(8, 8))], 100, score_fraction=1.0, rules=RULES)


def turning() -> list[Any]:
    color = [FILL] * 3
    return [RandomWindow(rotation=(-180, 180), color=color, whole=True), RandomDihedral()]


def tight(mask: torch.Tensor) -> torch.Tensor:
    """Corners of the box around a mask."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


@pytest.mark.parametrize("rle", [False, True])
def test_a_turned_instance_is_where_its_mask_says_and_has_the_size_of_others(
    folder: Path, rle: bool
) -> None:
    """The window follows the box of the turned instance, which no turned box is as small as."""
    box = (30, 40, 70, 50)
    changes = {"segmentation": as_rle(box, (96, 128))} if rle else {}
    rules = dataclasses.replace(RULES, shift=0.0, scale_jitter=0.0)
    records = [record(folder, annotation(box, **changes))]
    settings = {"rules": rules, "geometry": turning()}
    shapes_drawn = set()
    for sample in draw(records, 30, score_fraction=0.0, **settings):
        mask = sample["gt_mask"] > 0
        white = sample["image"][0, 8:-8, 8:-8] > 191
        assert (white & mask).sum() > 0.85 * (white | mask).sum()
        sides = tight(mask)[2:] - tight(mask)[:2]
        assert abs(sides.max() - 32) <= 3
        shapes_drawn.add(tuple(sides.tolist()))
    assert len(shapes_drawn) > 10
    for sample in draw(records, 30, score_fraction=1.0, **settings):
        if sample["label"] > 0:
            corners = tight(sample["image"][0] > 191)
            assert (abs(corners[:2] + corners[2:] - 80) <= 4).all()


def test_the_appearance_of_a_patch_changes_within_0_to_255_and_its_mask_does_not(
    folder: Path,
) -> None:
    records = [record(folder, annotation((20, 20, 60, 60)))]
    rules = dataclasses.replace(RULES, shift=0.0, scale_jitter=0.0)
    (sample,) = draw(
        records, 1, score_fraction=0.0, rules=rules, appearance=[T.RandomBrightness(2, 2)]
    )
    assert sample["image"].max() == 255 and sample["image"].shape == (3, 80, 80)
    assert (sample["gt_mask"] > 0).sum() == 32 * 32


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_images_are_drawn_by_their_weights(folder: Path, fraction: float) -> None:
    records = [record(folder, annotation((20, 20, 60, 60))) for _ in range(3)]
    weights = torch.tensor([1.0, 1.0, 4.0])
    samples = draw(records, 300, score_fraction=fraction, weights=weights)
    names = Counter(sample["file_name"] for sample in samples)
    assert 160 < names[records[2]["file_name"]] < 240


def test_augmentations_come_from_the_configuration(folder: Path) -> None:
    records = [record(folder, annotation((20, 20, 60, 60)))]
    words = ["INPUT.RANDOM_ROTATION", (0.0, 9.0), "INPUT.RANDOM_DIHEDRAL", True]
    words += ["INPUT.RANDOM_BLUR", (0.0, 1.0)]
    samples: Any = build_sample_loader(small_cfg(*words), records).dataset  # type: ignore[attr-defined]
    window, symmetry = samples.geometry.augs
    assert window.whole and window.color == [127.5] * 3 and window.rotation == (0.0, 9.0)
    assert isinstance(symmetry, RandomDihedral) and len(samples.appearance.augs) == 1
    with pytest.raises(ConfigError, match="as INPUT.SAMPLES PatchSamples draws scales by itself"):
        instseg.load_cfg("deepmask/deepmask_shapes.yaml", ["INPUT.RANDOM_SCALE", (0.5, 1.0)])


def small_cfg(*overrides: Any) -> Any:
    cfg = instseg.get_cfg()
    cfg.INPUT.SAMPLES = "PatchSamples"
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 6, "DATALOADER.NUM_WORKERS", 0, *overrides])
    return cfg


def test_sizes_come_from_the_configuration(folder: Path) -> None:
    records = [record(folder, annotation((20, 20, 60, 60)))]
    samples: Any = build_sample_loader(small_cfg(), records).dataset  # type: ignore[attr-defined]
    assert samples.rules == Rules(160, 16, 92, 112, 16.0, 0.25)
    assert (samples.batch_size, samples.score_fraction, samples.flip) == (6, 0.5, True)


def test_a_loader_gives_batches_of_samples(folder: Path) -> None:
    records = [record(folder, annotation((20, 20, 60, 60)))]
    batch = next(iter(build_sample_loader(small_cfg(), records)))
    assert len(batch) == 6 and batch[0]["image"].shape == (3, 192, 192)


def test_the_synthetic_shapes_are_drawn_from_too() -> None:
    cfg = instseg.load_cfg("deepmask/deepmask_shapes.yaml", ["DATALOADER.NUM_WORKERS", 0])
    batch = next(iter(build_sample_loader(cfg, shapes.load("shapes_train", 128, range(4)))))
    assert batch[0]["file_name"].startswith("shapes://shapes_train/128/")
