"""Data sets as objects: read once while anybody holds them, and shared without being changed."""

import copy
import gc
import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

import instseg
from instseg.data.build import parse_coco_name, register_coco, register_dataset
from instseg.data.dataset import DataSet, load
from instseg.data.loaders import build_train_loader
from instseg.errors import DatasetError
from instseg.training.trainer import Trainer
from tests.support.coco_data import changed, content, write_set

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The path of every file that is opened, as often as it is."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def read(name: str) -> DataSet:
    register_dataset(name)
    return load(name)


def test_a_set_is_read_once_while_it_is_held(tmp_path: Path, opened: list[str]) -> None:
    name = write_set(tmp_path, content())
    file = parse_coco_name(name)[0]
    opened.clear()
    dataset = read(name)
    assert load(name) is dataset and len(DatasetCatalog.get(name)) == 3
    assert len(dataset.coco.anns) == 4
    assert opened.count(file) == 1
    del dataset
    gc.collect()
    read(name)
    assert opened.count(file) == 2


def test_a_training_set_is_not_kept_beside_the_copy_of_its_loader(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    words = ["DATASETS.TRAIN", (name,), "INPUT.MASK_FORMAT", "bitmask", "DATALOADER.NUM_WORKERS", 0]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)
    dataset = read(name)
    loader, held = build_train_loader(cfg, [dataset]), weakref.ref(dataset)
    del dataset
    gc.collect()
    assert held() is None and next(iter(loader))


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    first = read(name)
    write_set(tmp_path, changed("annotations", to=content()["annotations"][:1]))
    second = load(name)
    assert [len(each.coco.anns) for each in (first, second)] == [4, 1]
    os.utime(parse_coco_name(name)[0], (1, 1))
    assert load(name) is not second


def test_two_names_of_a_file_share_one_reading(tmp_path: Path, opened: list[str]) -> None:
    name = write_set(tmp_path, content())
    file, folder = parse_coco_name(name)
    register_coco(f"other {tmp_path}", file, folder)
    opened.clear()
    first, second = read(name), load(f"other {tmp_path}")
    assert opened.count(file) == 1
    assert (first.name, second.name) == (name, f"other {tmp_path}")
    assert first.records is second.records and first.categories == second.categories
    assert MetadataCatalog.get(second.name).thing_classes == ["cat", "dog"]


def test_what_detectron2_is_given_may_be_changed(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    dataset = read(name)
    before = copy.deepcopy(dataset.records)
    for record in DatasetCatalog.get(name):
        record["height"] = 0
        for annotation in record["annotations"]:
            annotation["category_id"] = 5
            if isinstance(annotation["segmentation"], dict):
                annotation["segmentation"]["counts"] = ""
    assert dataset.records == before


def test_the_ground_truth_is_that_of_the_file(tmp_path: Path) -> None:
    given = content()
    given["annotations"][1]["area"] = 77.5  # kept, whatever the mask has
    name = write_set(tmp_path, given)
    theirs, ours = COCO(parse_coco_name(name)[0]), read(name).coco
    assert ours.getCatIds() == theirs.getCatIds() and ours.getImgIds() == theirs.getImgIds()
    for image_id in theirs.getImgIds():
        for one, other in zip(ours.imgToAnns[image_id], theirs.imgToAnns[image_id], strict=True):
            for key in ("bbox", "area", "iscrowd", "category_id", "image_id"):
                assert one[key] == other[key]
            masks = ours.annToRLE(one), theirs.annToRLE(other)
            assert mask_util.iou(*([mask] for mask in masks), [0]) == 1


def test_keypoints_are_those_of_the_file_in_coco_s_counting(tmp_path: Path) -> None:
    """Detectron2 measures to the centres of pixels, and writes into what it is given."""
    given = content()
    given["annotations"][0]["keypoints"] = [10, 12, 2, 3, 4, 1, 0, 0, 0]
    dataset = read(write_set(tmp_path, given))
    [record, *_] = DatasetCatalog.get(dataset.name)
    points = record["annotations"][0]["keypoints"]
    assert points == [10.5, 12.5, 2, 3.5, 4.5, 1, 0.5, 0.5, 0]
    points[:] = [0.0] * 9
    annotation, *others = dataset.coco.loadAnns(dataset.coco.getAnnIds(1))
    assert annotation["keypoints"] == [10, 12, 2, 3, 4, 1, 0, 0, 0]
    assert annotation["num_keypoints"] == 2
    assert not any("keypoints" in other for other in others)


def test_an_evaluation_leaves_the_records_as_they_are(tmp_path: Path) -> None:
    dataset = read(write_set(tmp_path, content()))
    before = copy.deepcopy(dataset.records)
    for annotation in dataset.coco.anns.values():
        annotation.update(segmentation=None, bbox=None)
    assert dataset.records == before


def test_a_file_without_annotations_has_no_ground_truth(tmp_path: Path) -> None:
    empty = read(write_set(tmp_path / "empty", changed("annotations", to=[])))
    none = read(write_set(tmp_path / "none", changed("annotations", to=KeyError)))
    assert "annotations" in empty.coco.dataset and "annotations" not in none.coco.dataset


@pytest.fixture
def function(tmp_path: Path) -> Iterator[str]:
    """A set of somebody's function."""
    records = DatasetCatalog.get(read(write_set(tmp_path, content())).name)
    name = f"function {tmp_path}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_another_function_of_the_same_name_is_another_set(function: str) -> None:
    first = load(function)
    assert load(function) is first and first.is_from_users
    records = list(first.records[:1])
    DatasetCatalog.remove(function)
    DatasetCatalog.register(function, lambda: records)
    assert len(load(function).records) == 1


def test_a_function_is_measured_with_the_ground_truth_that_it_names(
    function: str, tmp_path: Path
) -> None:
    """Detectron2's evaluator reads the file in ``json_file``."""
    given = content()
    given["annotations"][0]["bbox"] = [6, 6, 9, 9]
    given["annotations"][1]["area"] = -1  # made usable, as that of any other file
    file = parse_coco_name(write_set(tmp_path / "truth", given))[0]
    without = load(function).coco
    MetadataCatalog.get(function).json_file = file
    coco = load(function).coco
    assert [without.anns[1]["bbox"], coco.anns[1]["bbox"]] == [[5, 5, 10, 10], [6, 6, 9, 9]]
    assert coco.anns[2]["area"] > 0


def test_a_set_that_cannot_be_used_is_asked_for_again(tmp_path: Path) -> None:
    name = write_set(tmp_path, changed("annotations", 0, "category_id", to=99))
    for _ in range(2):
        with pytest.raises(DatasetError, match="category_id is 99"):
            read(name)
    write_set(tmp_path, content())
    assert len(load(name).records) == 3


def test_a_training_with_evaluations_opens_each_annotation_file_once(
    tmp_path: Path, opened: list[str]
) -> None:
    train, test = (
        write_set(tmp_path / part, changed("annotations", to=content()["annotations"][:2]))
        for part in ("train", "test")
    )
    videos = youtube_vis(tmp_path / "videos")
    words = [
        *("DATASETS.TRAIN", (train,), "DATASETS.TEST", (test, train, videos)),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "INPUT.MASK_FORMAT", "bitmask"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16),
        *("INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 32),
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0),
        *("TEST.METRICS", ("coco", "contest", "leaves", "voc"), "TEST.EVAL_PERIOD", 1),
        *("TEST.BEST_METRIC", f"{test}/segm/AP", "TEST.VAL_LOSS_PERIOD", 1),
        *("OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", 3),
    ]
    opened.clear()
    Trainer(instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)).train()
    counts = Counter(opened)
    files = [parse_coco_name(name)[0] for name in (train, test, videos)]
    assert [counts[file] for file in files] == [1, 1, 1]


def youtube_vis(folder: Path) -> str:
    """A clip of three frames without instances in sight."""
    coco = content()
    write_set(folder, coco)
    videos = [{"id": 1, "file_names": ["1.png", "2.png", "3.png"], "height": 30, "width": 40}]
    given = {"videos": videos, "annotations": [], "categories": coco["categories"]}
    (folder / "videos.json").write_text(json.dumps(given))
    return f"youtubevis:{folder}/videos.json:{folder}/images"
