"""Forms that annotation programs write in place of COCO's are read, and `check-data` notes them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

import instseg
from instseg.check_data import check_data
from instseg.data import build
from instseg.data.dataset import load
from instseg.data.findings import Kind
from instseg.evaluation import build_evaluator
from tests.support.coco_data import HEIGHT, SQUARE, WIDTH, content, write_set

PAIRS = [[5, 5], [15, 5], [15, 15], [5, 15]]


def records_of(name: str) -> list[dict[str, Any]]:
    if name not in DatasetCatalog:
        build.register_coco(name, *build.parse_coco_name(name))
    records: list[dict[str, Any]] = DatasetCatalog.get(name)
    return records


def everywhere(field: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    given = content()
    for entry in given[field]:
        change(entry)
    return given


def first(change: Callable[[dict[str, Any]], None], field: str = "annotations") -> dict[str, Any]:
    given = content()
    change(given[field][0])
    return given


def config(name: str, output: Path, *overrides: Any) -> CfgNode:
    words: list[Any] = [
        "DATASETS.TRAIN",
        (name,),
        "DATASETS.TEST",
        (name,),
        "OUTPUT_DIR",
        str(output),
    ]
    words += ["MODEL.ROI_HEADS.NUM_CLASSES", 2, *overrides]
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)


def floats(entry: dict[str, Any]) -> None:
    for key in ("id", "image_id", "category_id", "width", "height"):
        if key in entry:
            entry[key] = float(entry[key])


def float_rle(mask: Any) -> None:
    if isinstance(mask, dict):
        mask.update(size=[30.0, 40.0], counts=[float(count) for count in mask["counts"]])


FORMS = [
    (everywhere("images", floats), Kind.NUMBER, 3, "image 1: id is 1.0, taken as 1, width is 40.0"),
    (everywhere("annotations", floats), Kind.NUMBER, 4, "category_id is 7.0, taken as 7"),
    (everywhere("categories", floats), Kind.NUMBER, 2, "category 7: id is 7.0, taken as 7"),
    (first(lambda i: i.update(width="40"), "images"), Kind.NUMBER, 1, "width is '40', taken as 40"),
    (
        first(lambda i: i.update(height=" 30.0"), "images"),
        Kind.NUMBER,
        1,
        "image 1: height is ' 30.0', taken as 30",
    ),
    (first(lambda a: a.update(iscrowd=None)), Kind.NUMBER, 1, "iscrowd is None, taken as 0"),
    (first(lambda a: a.update(iscrowd="0")), Kind.NUMBER, 1, "iscrowd is '0', taken as 0"),
    (first(lambda a: a.update(iscrowd=False)), Kind.NUMBER, 1, "iscrowd is False, taken as 0"),
    (first(lambda a: a.update(iscrowd=0.0)), Kind.NUMBER, 1, "iscrowd is 0.0, taken as 0"),
    (first(lambda a: a.pop("bbox")), Kind.NO_BOX, 1, "that of the mask is [5, 5, 10, 10]"),
    (first(lambda a: a.update(bbox=None)), Kind.NO_BOX, 1, "annotation 11: bbox is missing"),
    (first(lambda a: a.update(bbox=[])), Kind.NO_BOX, 1, "annotation 11: bbox is missing"),
    (everywhere("annotations", lambda a: a.pop("bbox")), Kind.NO_BOX, 4, "bbox is missing"),
    (
        first(lambda a: a.update(segmentation=[PAIRS])),
        Kind.POINTS,
        1,
        "annotation 11: segmentation",
    ),
    (first(lambda a: a.update(segmentation=PAIRS)), Kind.POINTS, 1, "annotation 11: segm"),
    (first(lambda a: a.update(segmentation=SQUARE)), Kind.POINTS, 1, "annotation 11: segm"),
    (
        everywhere("annotations", lambda a: float_rle(a["segmentation"])),
        Kind.NUMBER,
        2,
        "annotation 13: size of its RLE are taken as whole numbers, counts of its RLE",
    ),
    (first(lambda a: a.pop("iscrowd")), None, 0, ""),
]


@pytest.mark.parametrize(("given", "kind", "count", "message"), FORMS)
def test_another_form_gives_the_same_records_and_a_note(
    tmp_path: Path, given: Any, kind: Kind | None, count: int, message: str
) -> None:
    expected = records_of(write_set(tmp_path / "plain", content()))
    name = write_set(tmp_path / "other", given)
    records = records_of(name)
    for record, plain in zip(records, expected, strict=True):
        plain["file_name"] = record["file_name"]
        for annotation in (*record["annotations"], *plain["annotations"]):
            annotation.setdefault("iscrowd", 0)
    assert records == expected
    (checked,) = check_data([name])
    assert {k: len(keys) for k, keys in checked.report.ids.items()} == (
        {kind: count} if kind else {}
    )
    assert kind is None or message in checked.report.examples[kind]


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]
)
def test_any_encoding_of_unicode_is_read(tmp_path: Path, encoding: str) -> None:
    given = content()
    given["categories"][0]["name"] = "Käfer 甲虫"
    text = json.dumps(given, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    name = write_set(tmp_path, text.encode(encoding))
    assert [len(record["annotations"]) for record in records_of(name)] == [2, 2, 0]
    assert load(name).classes == ("Käfer 甲虫", "dog")
    assert [checked.report.ids for checked in check_data([name])] == [{}]


def test_a_backslash_means_a_folder_where_that_has_the_file(tmp_path: Path) -> None:
    given = content()
    for image in given["images"]:
        image["file_name"] = "images\\" + image["file_name"]
    name = write_set(tmp_path, given).rpartition(":")[0]
    (checked,) = check_data([name])
    assert checked.report.ids == {Kind.BACKSLASH: [1, 2, 3]}
    assert all(Path(record["file_name"]).is_file() for record in records_of(name))


def test_a_backslash_in_the_name_of_a_file_that_is_there_stays(tmp_path: Path) -> None:
    given = content()
    given["images"][0]["file_name"] = "a\\1.png"
    name = write_set(tmp_path, given)
    os.rename(tmp_path / "images/1.png", tmp_path / "images/a\\1.png")
    assert records_of(name)[0]["file_name"].endswith("a\\1.png")
    assert [checked.report.ids for checked in check_data([name])] == [{}]


@pytest.mark.parametrize("prefix", ["coco", "youtubevis"])
def test_a_tilde_is_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    expected = ("/home/ada/a.json", "/home/ada/b")
    assert build.parse_coco_name(f"{prefix}:~/a.json:~/b") == expected
    assert build.parse_coco_name(f"{prefix}:~/a.json") == ("/home/ada/a.json", "/home/ada")


def instances(*boxes: list[int]) -> Instances:
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
        scores=torch.ones(len(boxes)),
        pred_classes=torch.zeros(len(boxes), dtype=torch.int64),
        pred_masks=masks,
    )


@pytest.mark.parametrize("metric", ["coco", "proposals"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_evaluation_sees_what_training_sees(tmp_path: Path, encoding: str, metric: str) -> None:
    """A perfect prediction is worth everything, whatever the file looks like."""
    given = content()
    one = given["annotations"][0]
    one.update(id=0, image_id=1.0, category_id=7.0, iscrowd=None, segmentation=PAIRS, area="?")
    del one["bbox"]
    given["annotations"] = [one]
    given["images"][0].update(id=1.0, width="40", height=30.0)
    name = write_set(tmp_path, json.dumps(given).encode(encoding))
    evaluator = build_evaluator(config(name, tmp_path, "TEST.METRICS", (metric,)), load(name))
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances([5, 5, 15, 15])}])
    results = evaluator.evaluate()
    if metric == "proposals":
        assert results["proposals_segm"]["AR@10"] == results["proposals_box"]["AR@10"] == 100
    else:
        assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "broken",
    [
        first(lambda i: i.update(width=None), "images"),
        first(lambda i: i.update(width=2**40), "images"),
        first(lambda i: i.update(file_name=3), "images"),
        first(lambda i: i.update(id=None), "images"),
        first(lambda i: i.update(id="a"), "images"),
        first(lambda c: c.update(id="7"), "categories"),
        first(lambda c: c.update(name=None), "categories"),
    ],
)
def test_one_fault_is_one_finding(tmp_path: Path, broken: Any) -> None:
    (checked,) = check_data([write_set(tmp_path, broken)])
    assert {kind: len(keys) for kind, keys in checked.report.ids.items()} == {Kind.FORMAT: 1}
