"""Annotations in COCO's format: refused, left out, or only reported."""

import functools
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

import instseg
from instseg.data import build
from instseg.data.findings import Finding, Kind, Level, Report
from instseg.data.ground_truth import prepare_ground_truth
from instseg.data.mappers import build_train_mapper
from instseg.data.readers.coco_check import check_coco
from instseg.data.readers.coco_forms import to_standard
from instseg.data.readers.json_files import read_json
from instseg.errors import DatasetError
from tests.support.coco_data import HEIGHT, SQUARE, WIDTH, changed, content, write_set

IMAGE = ("images", 0)
OBJECT = ("annotations", 0)
MASK = (*OBJECT, "segmentation")
RLE = ("annotations", 2, "segmentation")
NAN, INF = float("nan"), float("inf")
HUGE = 10**308
FAR = [5, 5, 1e9, 5, 15, 15]
WITHOUT_BOX = {
    **{"id": 13, "image_id": 2, "category_id": 7},
    "segmentation": {"size": [HEIGHT, WIDTH], "counts": "oooo"},
}

REFUSED = [
    ([], Kind.FORMAT, None, "there are no images; expected the COCO instance format"),
    (changed("images", to=KeyError), Kind.FORMAT, None, "there are no images"),
    (changed("images", to=[]), Kind.FORMAT, None, "there are no images"),
    (changed("categories", to=[]), Kind.FORMAT, None, "there are no categories"),
    (changed("annotations", to={}), Kind.FORMAT, None, "there are no annotations"),
    (changed(*IMAGE, to=3), Kind.FORMAT, None, "an image is 3; expected an object with id and"),
    (changed(*IMAGE, "id", to=None), Kind.FORMAT, None, "an image is {'id': None,"),
    (changed(*IMAGE, "id", to="a"), Kind.FORMAT, None, "some ids of images are numbers and other"),
    (changed(*IMAGE, "id", to=2), Kind.IMAGE_ID, 2, "two images have the id 2: 1.png and 2.png"),
    (
        changed(*IMAGE, "file_name", to=KeyError),
        Kind.FORMAT,
        None,
        "expected an object with id and",
    ),
    (changed(*IMAGE, "width", to=-4), Kind.FORMAT, 1, "image 1 (1.png) has width -4 and height 30"),
    (changed(*IMAGE, "height", to=KeyError), Kind.FORMAT, 1, "has width 40 and height None"),
    (changed(*IMAGE, "width", to=2**40), Kind.FORMAT, 1, "at most 178956970 pixels in all"),
    (changed("categories", 0, "id", to="7"), Kind.FORMAT, None, "with a whole number as id"),
    (changed("categories", 0, "name", to=KeyError), Kind.FORMAT, None, "as id and a name"),
    (changed("categories", 0, "id", to=8), Kind.CATEGORY_ID, 8, "have the id 8: cat and dog"),
    (changed(*OBJECT, to="x"), Kind.FORMAT, None, "an annotation is 'x'; expected an object"),
    (changed(*OBJECT, "id", to=KeyError), Kind.FORMAT, None, "expected an object with an id"),
    (changed(*OBJECT, "id", to=12), Kind.ANNOTATION_ID, 12, "two annotations have the id 12"),
    (
        changed(*OBJECT, "category_id", to="7"),
        Kind.UNKNOWN_CATEGORY,
        11,
        "annotation 11 of image 1 (1.png): category_id is '7' of type str; the categories have the "
        "ids 7, 8",
    ),
    (changed(*OBJECT, "category_id", to=9), Kind.UNKNOWN_CATEGORY, 11, "is 9 of type int; the"),
    (changed(*OBJECT, "category_id", to=[7]), Kind.UNKNOWN_CATEGORY, 11, "[7] of type list"),
    (changed(*OBJECT, "iscrowd", to="no"), Kind.FORMAT, 11, "iscrowd is 'no'; expected 0 or 1"),
    (changed(*OBJECT, "ignore", to=1), Kind.FORMAT, 11, "set iscrowd to 1 instead"),
    (
        changed(*OBJECT, to={"id": 11, "image_id": 1, "category_id": 7}),
        Kind.FORMAT,
        11,
        "bbox is None; expected [x, y, width, height] in pixels",
    ),
    (changed(*OBJECT, "bbox", to=[1, 2, 3, "4"]), Kind.FORMAT, 11, "bbox is [1, 2, 3, '4']"),
    (
        changed(*OBJECT, "bbox", to=[5, 5, -3, -3]),
        Kind.INVERTED_BOX,
        11,
        "annotation 11 of image 1 (1.png): bbox is [5, 5, -3, -3], of negative size",
    ),
    (changed(*OBJECT, "keypoints", to=[5, 5, "2"]), Kind.FORMAT, 11, "keypoints are [5, 5, '2']"),
    (
        changed(*OBJECT, "keypoints", to=7),
        Kind.FORMAT,
        11,
        "keypoints are 7; expected numbers, [x,",
    ),
    (
        changed(*MASK, to=[SQUARE, 5]),
        Kind.FORMAT,
        11,
        "expected polygons, [[x, y, x, y, ...], ...]",
    ),
    (changed(*MASK, to="x"), Kind.FORMAT, 11, "segmentation is 'x'; expected a list of polygons"),
    (changed(*MASK, to=[["5"] * 6]), Kind.FORMAT, 11, "expected numbers, [[x, y, x, y, ...], ...]"),
    (changed(*MASK, to=[[[1, 2, 3]] * 6]), Kind.FORMAT, 11, "expected numbers, [[x, y, x, y, ...]"),
    (changed(*RLE, "size", to=[WIDTH, HEIGHT]), Kind.RLE, 13, "the mask is of [40, 30], its image"),
    (changed(*RLE, "size", to=KeyError), Kind.RLE, 13, "the mask is of None"),
    (changed(*RLE, "size", to=[30.5, 40]), Kind.RLE, 13, "the mask is of [30.5, 40]"),
    (changed(*RLE, "counts", to=[1, 2]), Kind.RLE, 13, "the runs do not add up to 30 x 40 pixels"),
    (changed(*RLE, "counts", to=[1300, -100]), Kind.RLE, 13, "the runs do not add up"),
    (changed(*RLE, "counts", to="oooo"), Kind.RLE, 13, "no mask can be read from it"),
    (
        changed("annotations", 2, to=WITHOUT_BOX),
        Kind.RLE,
        13,
        "no mask can be read from it",
    ),
    (changed(*RLE, "counts", to=KeyError), Kind.RLE, 13, "no mask can be read from it"),
]
WITHOUT_MASK = [
    (changed(*MASK, to=[]), Kind.NO_MASK, 11, "(1.png): it has no segmentation; expected a list"),
    (changed(*MASK, to=KeyError), Kind.NO_MASK, 11, "it has no segmentation"),
]
LEFT_OUT = [
    (
        changed(*OBJECT, "image_id", to=9),
        Kind.UNKNOWN_IMAGE,
        11,
        "belongs to the image 9, which is",
    ),
    (changed(*MASK, to=[[1, 2, 3, 4]]), Kind.FEW_POINTS, 11, "have 4 numbers; expected 6 or more"),
    (changed(*MASK, to=[SQUARE[:7], []]), Kind.FEW_POINTS, 11, "its polygons have 7, 0 numbers"),
    (
        changed(*MASK, to=[[NAN, *SQUARE[1:]]]),
        Kind.NOT_FINITE,
        11,
        "coordinates that are not finite",
    ),
    (changed(*MASK, to=[[10**400, *SQUARE[1:]]]), Kind.NOT_FINITE, 11, "that are not finite"),
    (changed(*OBJECT, "bbox", to=[5, NAN, 1, 1]), Kind.NOT_FINITE, 11, "bbox is [5, nan, 1, 1]"),
    (changed(*OBJECT, "bbox", to=[5, 5, 1, INF]), Kind.NOT_FINITE, 11, "bbox is [5, 5, 1, inf]"),
    (
        changed(*OBJECT, "bbox", to=[50, 5, 3, 3]),
        Kind.OUTSIDE,
        11,
        "bbox reaches from (50, 5) to (53, 8), the image is 40 x 30",
    ),
    (
        changed(*MASK, to=[[x + 60 for x in SQUARE]]),
        Kind.OUTSIDE,
        11,
        "its outline reaches from (65",
    ),
    (
        changed(*OBJECT, "bbox", to=[HUGE, 5, HUGE, 5]),
        Kind.OUTSIDE,
        11,
        "bbox reaches from (1e+308, 5) to (inf, 10)",
    ),
    (changed(*MASK, to=[FAR]), Kind.OUTSIDE, 11, "its outline reaches from (5, 5) to (1e+09, 15)"),
]
TOLD = [
    (changed("categories", 0, "name", to="dog"), Kind.REPEATED_NAME, 8, "category 8 is dog, as"),
    (
        changed(*IMAGE, "file_name", to="2.png"),
        Kind.REPEATED_FILE,
        2,
        "image 2 is 2.png, as anothe",
    ),
    (
        changed(*MASK, to=[SQUARE, [1, 2]]),
        Kind.POLYGON_PART,
        11,
        "1 of its 2 polygons are left out",
    ),
    (changed(*MASK, to=[[5, 5, 5.5, 5, 5, 9]]), Kind.TINY_MASK, 11, "its polygons span 0.5 x 4"),
    (changed(*RLE, "counts", to=[1200]), Kind.TINY_MASK, 13, "its RLE has no pixel"),
    (changed(*OBJECT, "bbox", to=[5, 5, 0, 3]), Kind.EMPTY_BOX, 11, "bbox is [5, 5, 0, 3]"),
    (
        changed(*OBJECT, "bbox", to=[5, 5, 40, 3]),
        Kind.PARTLY_OUTSIDE,
        11,
        "to (45, 8), the image",
    ),
]


def read(folder: Path, given: Any) -> list[dict[str, Any]]:
    name = write_set(folder, given)
    build.register_coco(name, *build.parse_coco_name(name))
    records: list[dict[str, Any]] = DatasetCatalog.get(name)
    return records


def ids(records: list[dict[str, Any]]) -> list[int]:
    return [annotation["id"] for record in records for annotation in record["annotations"]]


def test_nothing_is_found_in_a_sound_set() -> None:
    assert list(check_coco(content())) == []


@pytest.mark.parametrize(
    ("broken", "kind", "key", "message"), [*REFUSED, *WITHOUT_MASK, *LEFT_OUT, *TOLD]
)
def test_a_finding_has_its_kind_the_id_and_what_was_found(
    broken: Any, kind: Kind, key: Any, message: str
) -> None:
    first = next(iter(check_coco(broken)))
    assert (first.kind, first.id) == (kind, key)
    assert message in first.message


@pytest.mark.parametrize(("broken", "kind", "key", "message"), REFUSED)
def test_a_set_with_an_error_is_refused_when_it_is_read(
    broken: Any, kind: Kind, key: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, broken)
    assert str(caught.value).startswith(f"data set {tmp_path / 'instances.json'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("broken", "kind", "key", "message"), LEFT_OUT)
def test_an_instance_with_a_warning_is_left_out_and_told(
    broken: Any,
    kind: Kind,
    key: Any,
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "instseg"):
        records = read(tmp_path, broken)
    assert ids(records) == [12, 13, 14]
    assert len(records) == 3
    assert any("left out: " in line and message in line for line in caplog.messages)


@pytest.mark.parametrize(("broken", "kind", "key", "message"), TOLD)
def test_what_is_only_told_changes_nothing(
    broken: Any, kind: Kind, key: Any, message: str, tmp_path: Path
) -> None:
    assert ids(read(tmp_path, broken)) == [11, 12, 13, 14]


def test_ids_written_as_floating_point_numbers_are_those_of_whole_ones(tmp_path: Path) -> None:
    given = content()
    for annotation in given["annotations"]:
        for key in ("id", "image_id", "category_id"):
            annotation[key] = float(annotation[key])
    assert ids(read(tmp_path, given)) == [11, 12, 13, 14]


def test_the_extent_of_an_outline_may_be_beyond_all_numbers() -> None:
    first, second = check_coco(changed(*MASK, to=[[-HUGE, 5, HUGE, 5, 0, 5]]))
    assert (first.kind, second.kind) == (Kind.TINY_MASK, Kind.OUTSIDE)
    assert "its polygons span inf x 0 pixels" in first.message


def test_findings_of_one_kind_are_counted_and_the_first_named() -> None:
    given = content()
    for annotation in given["annotations"][:3]:
        annotation["bbox"] = [1, 1, -1, 1]
    lines = list(Report(check_coco(given)).lines(Level.ERROR))
    assert len(lines) == 1
    assert lines[0].startswith("annotation 11 of") and lines[0].endswith("(and 2 more: 12, 13)")


def test_findings_about_entries_without_ids_are_counted() -> None:
    report = Report([Finding(Kind.FORMAT, None, f"an image is {x}") for x in (3, 4, 5)])
    assert list(report.lines(Level.ERROR)) == ["an image is 3 (and 2 more)"]


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate((b"", b"{", b"\xff\xfe{}", b"[" * 10**5)):
        with pytest.raises(DatasetError, match=r"instances\.json is not JSON"):
            read(tmp_path / str(number), text)


def test_records_are_those_of_detectron2_with_ids(data_root: Path) -> None:
    folder = data_root / "coco_mini"
    source = (str(folder / "instances_val.json"), str(folder / "images"))
    build.register_coco("coco_mini_val with ids", *source)
    records = DatasetCatalog.get("coco_mini_val with ids")
    for record in records:
        for annotation in record["annotations"]:
            del annotation["id"], annotation["area"]
    assert records == load_coco_json(*source, "coco_mini_val without")


def test_real_sets_are_sound(data_root: Path) -> None:
    for name in ("coco_mini", "nuclei"):
        file = str(data_root / name / "instances_train.json")
        assert not list(check_coco(read_json(file, name)))


def test_many_instances_take_seconds() -> None:
    """860 000 instances, COCO's training set, take some 10 s of one core."""
    given = content()
    one = given["annotations"][0]
    many = [{**one, "id": key, "segmentation": [SQUARE * 8]} for key in range(30_000)]
    started = time.process_time()
    assert not list(check_coco({**given, "annotations": many}))
    assert time.process_time() - started < 3


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.just(HUGE)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@functools.cache
def config() -> CfgNode:
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")


@given(
    where=st.sampled_from(
        [(), ("images",), IMAGE, ("categories", 0), ("annotations",), OBJECT, MASK, RLE]
        + [(*OBJECT, "bbox"), (*MASK, 0), (*RLE, "counts"), (*RLE, "size")]
    ),
    key=st.integers(0, 9),
    value=json_values | st.lists(st.floats() | st.integers(-50, 50), max_size=8),
)
def test_whatever_a_file_holds_it_is_refused_or_can_be_trained_on(
    where: tuple[Any, ...], key: int, value: Any
) -> None:
    broken = content()
    node: Any = broken
    for part in where:
        node = node[part]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    node[keys[key % len(keys)]] = value
    cfg = config()
    try:
        with TemporaryDirectory() as folder:
            records = read(Path(folder), broken)
        build.check_records(cfg, "fuzz", records)
    except DatasetError:
        return
    for record in records:
        sample = build_train_mapper(cfg, augment=False)(record)
        assert len(sample["instances"]) <= len(record["annotations"])
    coco = COCO()
    to_standard(broken, "")
    coco.dataset = broken
    coco.createIndex()
    prepare_ground_truth(coco)
    for annotation in coco.anns.values():
        assert mask_util.decode(coco.annToRLE(annotation)).shape == (HEIGHT, WIDTH)


@given(content=st.binary(max_size=80))
def test_random_bytes_are_refused(content: bytes) -> None:
    with TemporaryDirectory() as folder, pytest.raises(DatasetError):
        read(Path(folder), content)


def test_a_compressed_rle_decodes_to_the_runs_that_were_checked(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[3:20, 4:9] = mask[25, 39] = 1
    rle = mask_util.encode(mask)
    text = {"size": rle["size"], "counts": rle["counts"].decode()}
    records = read(tmp_path, changed(*RLE, to=text))
    assert np.array_equal(mask_util.decode(records[1]["annotations"][0]["segmentation"]), mask)
