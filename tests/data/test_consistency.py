"""Fields of instances are compared; a fault in most of a data set is reported as one of the set."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

import instseg
from instseg import cli
from instseg.check_data import check_data
from instseg.data import build
from instseg.data.dataset import load, load_all
from instseg.data.findings import Kind
from instseg.evaluation import build_evaluator, check_evaluation
from tests.support.coco_data import HEIGHT, WIDTH, write_set

SIDES = [(3, 2, 9, 12), (20, 4, 12, 8), (6, 18, 14, 9), (25, 16, 10, 12), (12, 1, 6, 14)]


def sound() -> dict[str, Any]:
    """Five rectangles in each of three images: four polygons and an RLE."""
    annotations: list[dict[str, Any]] = []
    for image in (1, 2, 3):
        for number, (x, y, across, down) in enumerate(SIDES):
            right, bottom = x + across, y + down
            mask: Any = [[x, y, right, y, right, bottom, x, bottom]]
            if number == 4:
                rest = HEIGHT - down
                runs = [x * HEIGHT + y, *[down, rest] * (across - 1), down]
                runs.append(WIDTH * HEIGHT - sum(runs))
                mask = {"size": [HEIGHT, WIDTH], "counts": runs}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "bbox": [x, y, across, down],
                    "segmentation": mask,
                    "area": across * down,
                    "iscrowd": 0,
                }
            )
    images = [
        {"id": key, "file_name": f"{key}.png", "width": WIDTH, "height": HEIGHT}
        for key in (1, 2, 3)
    ]
    categories = [{"id": 1, "name": "thing"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def with_boxes(change: Callable[..., Any], count: int = 15) -> dict[str, Any]:
    """The sound set with other boxes in the last ``count`` annotations."""
    given = sound()
    for annotation in given["annotations"][15 - count :]:
        annotation["bbox"] = list(change(*annotation["bbox"]))
    return given


def with_values(count: int = 15, **values: Any) -> dict[str, Any]:
    given = sound()
    for annotation in given["annotations"][15 - count :]:
        annotation.update(copy.deepcopy(values))
    return given


def with_relative_masks() -> dict[str, Any]:
    given = with_boxes(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT])
    for annotation in given["annotations"]:
        if isinstance(annotation["segmentation"], list):
            (outline,) = annotation["segmentation"]
            sizes = [WIDTH, HEIGHT] * (len(outline) // 2)
            pairs = zip(outline, sizes, strict=True)
            annotation["segmentation"] = [[value / size for value, size in pairs]]
    return given


def with_box_areas() -> dict[str, Any]:
    given = sound()
    for annotation in given["annotations"]:
        x, y, across, down = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + across, y, x + across, y + down]]
    return given


MISTAKES = {
    "corners": (
        with_boxes(lambda x, y, w, h: (x, y, x + w, y + h)),
        Kind.BOXES,
        r"the boxes of 15 of 15 instances look like corners \[x1, y1, x2, y2\]; expected \[x, y, ",
    ),
    "corners in most": (
        with_boxes(lambda x, y, w, h: (x, y, x + w, y + h), 9),
        Kind.BOXES,
        "the boxes of 9 of 15 instances look like corners",
    ),
    "centres": (
        with_boxes(lambda x, y, w, h: (x + w / 2, y + h / 2, w, h)),
        Kind.BOXES,
        r"look like \[centre x, centre y, width, height\]",
    ),
    "swapped": (
        with_boxes(lambda x, y, w, h: (y, x, h, w)),
        Kind.BOXES,
        r"look like \[y, x, height, width\]",
    ),
    "from 1": (
        with_boxes(lambda x, y, w, h: (x + 1, y + 1, w, h)),
        Kind.BOXES,
        r"look like \[x, y, width, height\] counted from 1",
    ),
    "halves": (
        with_boxes(lambda x, y, w, h: (x / 4, y / 4, w / 4, h / 4)),
        Kind.BOXES,
        "the boxes of 1[0-9] of 15 instances are elsewhere than their masks; first annotation 1 of",
    ),
    "one box": (
        with_values(bbox=[0, 0, 1, 1]),
        Kind.SAME_BOX,
        r"15 of 15 instances have the same box, \[0, 0, 1, 1\]",
    ),
    "boxes in 0 to 1": (
        with_boxes(lambda x, y, w, h: (x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT)),
        Kind.RELATIVE,
        "the boxes of most of 15 instances lie within 0 to 1: parts of the image",
    ),
    "masks in 0 to 1": (
        with_relative_masks(),
        Kind.RELATIVE,
        "the boxes of most of 15 instances lie within 0 to 1",
    ),
    "crowds": (
        with_values(14, iscrowd=1),
        Kind.MOST_CROWDS,
        r"14 of 15 instances are crowds \(iscrowd 1\)",
    ),
    "no area": (with_values(area=0), Kind.AREAS, "the area of 15 of 15 instances is 0; AP of"),
    "area of boxes": (
        with_box_areas(),
        Kind.AREAS,
        "the area of 15 of 15 instances is that of the box",
    ),
    "area of nothing": (
        with_values(area=10**4),
        Kind.AREAS,
        "the area of 15 of 15 instances is not that of the mask",
    ),
}


@pytest.mark.parametrize(("given", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_holds_for_most_is_a_warning_about_the_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: Any, kind: Kind, message: str
) -> None:
    """``check-data`` and the log of a training both warn; no instance is lost."""
    name = write_set(tmp_path, given)
    (checked,) = check_data([name])
    warnings = {k: keys for k, keys in checked.report.ids.items() if k.level.value != "note"}
    assert warnings == {kind: [None]}
    assert cli.main(["check-data", name]) == 0
    assert cli.main(["check-data", "--strict", name]) == 1
    with caplog.at_level(logging.WARNING, "instseg"):
        records = DatasetCatalog.get(name)
    assert sum(len(record["annotations"]) for record in records) == 15
    text = checked.report.examples[kind]
    assert any(text in line for line in caplog.messages)
    assert re.search(message, text)


NOTES = [
    (
        with_boxes(lambda x, y, w, h: (x + 5, y, w, h), 2),
        Kind.BOX_MISMATCH,
        [14, 15],
        "annotation 14 of image 3 (3.png): its box is [30, 16, 40, 28], that of its mask [25, 16, ",
    ),
    (
        with_values(2, area=9999),
        Kind.AREA_MISMATCH,
        [14, 15],
        "annotation 14 of image 3 (3.png): area is 9999, that of its mask 120",
    ),
]


@pytest.mark.parametrize(("given", "kind", "keys", "message"), NOTES)
def test_a_field_that_contradicts_another_is_a_note_about_its_annotation(
    tmp_path: Path, given: Any, kind: Kind, keys: list[int], message: str
) -> None:
    (checked,) = check_data([write_set(tmp_path, given)])
    assert checked.report.ids == {kind: keys}
    assert checked.report.examples[kind].startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        sound(),
        with_boxes(lambda x, y, w, h: (x, y, w - 1, h - 1)),
        with_boxes(lambda x, y, w, h: (x - 0.5, y - 0.5, w + 1, h + 1)),
        with_values(7, iscrowd=1),
        with_values(area=None),
        {**sound(), "annotations": []},
    ],
    ids=["sound", "to the last pixel", "half a pixel", "some crowds", "no area", "nothing"],
)
def test_what_is_usual_is_no_mistake(tmp_path: Path, given: Any) -> None:
    (checked,) = check_data([write_set(tmp_path, given)])
    assert set(checked.report.ids) <= {Kind.NO_INSTANCE}


def test_one_box_for_all_is_right_where_it_is_that_of_the_masks(tmp_path: Path) -> None:
    x, y, across, down = box = [5, 5, 10, 10]
    mask = [[x, y, x + across, y, x + across, y + down, x, y + down]]
    (checked,) = check_data(
        [write_set(tmp_path, with_values(bbox=box, segmentation=mask, area=100))]
    )
    assert checked.report.ids == {}


@pytest.mark.parametrize("name", ["coco_mini_train", "coco_mini_val", "nuclei_train", "nuclei_val"])
def test_real_sets_are_consistent(data_root: Path, name: str) -> None:
    (checked,) = check_data([name])
    assert set(checked.report.ids) <= {Kind.MANY_INSTANCES}


def test_registered_records_are_compared_too(tmp_path: Path) -> None:
    source = write_set(tmp_path, with_boxes(lambda x, y, w, h: (x, y, x + w, y + h)))
    build.register_coco(source, *build.parse_coco_name(source))
    records = DatasetCatalog.get(source)
    name = f"corners {tmp_path}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["thing"]
    (checked,) = check_data([name])
    assert Kind.BOXES in checked.report.ids


# More instances than a model may find.


def crowded(folder: Path, count: int) -> str:
    given = sound()
    one = given["annotations"][0]
    given["annotations"] = [{**one, "id": key, "image_id": 2} for key in range(1, count + 1)]
    given["annotations"] += [{**one, "id": key, "iscrowd": 1} for key in range(900, 950)]
    return write_set(folder, given)


@pytest.mark.parametrize(("count", "expected"), [(100, {}), (101, {Kind.MANY_INSTANCES: [2]})])
def test_check_data_warns_of_more_instances_than_are_found_by_default(
    tmp_path: Path, count: int, expected: Any
) -> None:
    (checked,) = check_data([crowded(tmp_path, count)])
    assert checked.report.ids == expected
    if expected:
        text = checked.report.examples[Kind.MANY_INSTANCES]
        assert text.startswith("image 2 has 101 instances, and TEST.DETECTIONS_PER_IMAGE is 100")
        assert text.endswith("set TEST.DETECTIONS_PER_IMAGE 101")


@pytest.mark.parametrize("metric", ["coco", "proposals"])
def test_evaluation_warns_once_of_more_instances_than_may_be_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metric: str
) -> None:
    name = crowded(tmp_path, 30)
    words = ["DATASETS.TEST", (name,), "TEST.DETECTIONS_PER_IMAGE", 20]
    words += ["OUTPUT_DIR", str(tmp_path), "TEST.METRICS", (metric,)]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)
    with caplog.at_level(logging.WARNING, "instseg"):
        check_evaluation(cfg, nn.Identity(), load_all(cfg.DATASETS.TEST))
        for _ in range(2):
            build_evaluator(cfg, load(name))
    told = [line for line in caplog.messages if "DETECTIONS_PER_IMAGE" in line]
    assert told == [
        f"data set {name}: 1 images have more instances than TEST.DETECTIONS_PER_IMAGE (20) allows "
        "to find, so that 10 of 30 count as missed whatever the model finds; set "
        "TEST.DETECTIONS_PER_IMAGE 30"
    ]


def test_evaluation_warns_of_nothing_where_all_instances_may_be_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = crowded(tmp_path, 30)
    words = ["DATASETS.TEST", (name,), "TEST.DETECTIONS_PER_IMAGE", 30, "OUTPUT_DIR", str(tmp_path)]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)
    with caplog.at_level(logging.WARNING, "instseg"):
        build_evaluator(cfg, load(name))
    assert "DETECTIONS_PER_IMAGE" not in caplog.text
