"""Records of functions registered with Detectron2: refused in one line, left out, or told."""

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import instseg
from instseg import cli
from instseg.check_data import check_data
from instseg.data import build
from instseg.data.dataset import load, load_all
from instseg.data.findings import Kind
from instseg.data.mappers import build_train_mapper
from instseg.data.records import CheckedRecords
from instseg.errors import DatasetError, ImageError
from instseg.evaluation import build_evaluator, check_evaluation
from instseg.predict.sources import dataset_sources
from instseg.training.trainer import Trainer
from tests.support.coco_data import HEIGHT, WIDTH, changed, content, write_set
from tests.support.records import (
    MASK,
    NAME,
    RLE,
    Change,
    Records,
    changing,
    config,
    each,
    image,
    plain,
    update,
)

NAN = float("nan")


def first(**values: Any) -> Change:
    """Changes the annotation of the second record."""
    return lambda records: update(records[1]["annotations"][0], values)


def second(**values: Any) -> Change:
    """Changes the second record."""
    return lambda records: update(records[1], values)


OF_FIRST = r"annotation 0 of record 1 \(.*2\.png\): "
REFUSED: list[tuple[Change, str]] = [
    (first(category_id=2), OF_FIRST + r"category_id is 2; .*2 thing_classes .*count from 1\?"),
    (first(category_id=-1), OF_FIRST + "category_id is -1"),
    (first(category_id=1.5), OF_FIRST + "category_id is 1.5; expected a whole number"),
    (first(category_id="1"), OF_FIRST + "category_id is '1'; expected a whole number"),
    (first(category_id=True), OF_FIRST + "category_id is True"),
    (first(category_id=KeyError), OF_FIRST + "category_id is None"),
    (first(bbox=[NAN, 5, 15, 15]), OF_FIRST + r"bbox is \[nan, .* expected finite numbers"),
    (first(bbox=[15, 15, 5, 5]), OF_FIRST + r"bbox is .*\.XYXY_ABS, of negative size"),
    (
        first(bbox=[5, 5, -3, 3], bbox_mode=BoxMode.XYWH_ABS),
        OF_FIRST + r"bbox is .*\.XYWH_ABS, of negative size",
    ),
    (first(bbox=[1, 2, 3]), OF_FIRST + r"bbox is \[1, 2, 3\]; expected 4 numbers"),
    (first(bbox="5 5 15 15"), OF_FIRST + "bbox is '5 5 15 15'; expected 4 numbers"),
    (first(bbox=np.zeros((1, 4))), OF_FIRST + "bbox is .*; expected 4 numbers"),
    (first(bbox_mode=KeyError), OF_FIRST + r"bbox_mode is None; expected BoxMode\.XYXY_ABS"),
    (first(bbox_mode="XYXY"), OF_FIRST + "bbox_mode is 'XYXY'"),
    (first(bbox_mode=np.array([])), OF_FIRST + r"bbox_mode is array\(\[\]"),
    (first(bbox_mode=np.array([0, 1])), OF_FIRST + r"bbox_mode is array\(\[0, 1\]"),
    (first(bbox_mode=BoxMode.XYXY_REL), OF_FIRST + r"bbox is .*\.XYXY_REL; expected parts"),
    (first(bbox=KeyError, segmentation=KeyError), OF_FIRST + "it has neither bbox nor segm"),
    (first(segmentation=MASK[:9]), OF_FIRST + r"the mask is an array of \(9, 40\), its image"),
    (first(segmentation=MASK.T), OF_FIRST + r"the mask is an array .* is it transposed\?"),
    (first(segmentation=MASK * 0.5), OF_FIRST + "the mask is an array of float64; expected bool"),
    (first(segmentation={**RLE, "size": [40, 30]}), OF_FIRST + r"the mask is of \[40, 30\]"),
    (first(segmentation={**RLE, "counts": b"oooo"}), OF_FIRST + "no mask can be read from it"),
    (first(segmentation="mask.png"), OF_FIRST + "segmentation is 'mask.png'; expected polygons"),
    (first(segmentation=[[1, 2, 3, 4]]), OF_FIRST + "its polygons have 4 numbers"),
    (first(segmentation=[[NAN] * 6]), OF_FIRST + "its polygons have coordinates that are not fin"),
    (first(segmentation=[["a"] * 6]), OF_FIRST + r"segmentation is \[\['a', .*; expected polygons"),
    (first(iscrowd=2), OF_FIRST + "iscrowd is 2; expected 0 or 1"),
    (lambda r: r[1].update(annotations=[3]), OF_FIRST + "it is 3; expected a dict"),
    (second(annotations="none"), r"record 1 \(.*2\.png\) has annotations 'none'; expected a list"),
    (second(file_name=KeyError), "record 1 has file_name None; expected the path of an image"),
    (second(file_name=b"a.png"), "record 1 has file_name b'a.png'"),
    (second(image_id=[1]), r"record 1 \(.*\) has image_id \[1\]; expected a whole number or text"),
    (second(height=-3), r"record 1 \(.*2\.png\) has height -3; expected pixels"),
    (second(height=10**6, width=10**6), r"record 1 .* is said to be 1000000 x 1000000 pixels"),
    (second(height=None, file_name="no.png"), r"record 1 \(no\.png\) has no height and width, and"),
    (
        second(height=None, file_name="s3://b/a.png"),
        r"record 1 \(s3://b/a.png\) has no height and width; add those of the image",
    ),
    (lambda r: [r[0], 3], "record 1 is 3; expected a dict"),
    (lambda r: [], "its function gives no records"),
    (lambda r: r[0], r"its function gives \{.*; expected a list of records"),
    (lambda r: 5, "its function gives 5; expected a list of records"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_used_is_one_line_before_training_and_in_check_data(
    tmp_path: Path,
    registered: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    change: Change,
    message: str,
) -> None:
    name = registered(changing(tmp_path, change))
    with pytest.raises(DatasetError, match=f"data set {NAME}: {message}") as caught:
        Trainer.build_train_loader(config(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match=message):
        load(NAME)
    assert cli.main(["check-data", name]) == 1
    assert "error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, r"thing_classes are not set; .*MetadataCatalog\.get\('somebodys'\)\.thing_classes"),
        ("cat", "thing_classes are 'cat'; name the classes"),
        ([], r"thing_classes are \[\]; name the classes"),
        ([0, 1], r"thing_classes are \[0, 1\]; name the classes"),
    ],
)
def test_classes_without_names_are_refused(
    tmp_path: Path, registered: Callable[..., str], classes: Any, message: str
) -> None:
    registered(changing(tmp_path, lambda r: None), classes)
    with pytest.raises(DatasetError, match=message):
        Trainer(config(tmp_path))


def test_ids_of_classes_that_do_not_count_from_0_are_refused(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    name = registered(changing(tmp_path, lambda r: None))
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {7: 1, 8: 2}
    with pytest.raises(DatasetError, match="thing_dataset_id_to_contiguous_id is {7: 1, 8: 2}"):
        Trainer.build_train_loader(config(tmp_path))


def test_an_instance_outside_its_image_is_left_out_and_told(
    tmp_path: Path, registered: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = registered(changing(tmp_path, first(bbox=[50.0, 5, 60, 15])))
    config(tmp_path)
    with caplog.at_level(logging.WARNING, "instseg"):
        assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [1, 0]
    assert any("left out: annotation 0 of record 1" in line for line in caplog.messages)


def test_records_without_ids_are_numbered_and_that_is_said_once(
    tmp_path: Path, registered: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = registered(
        changing(tmp_path, lambda r: r[0].pop("image_id") and r[1].update(image_id=0))
    )
    config(tmp_path)
    with caplog.at_level(logging.WARNING, "instseg"):
        for _ in range(2):
            assert [record["image_id"] for record in DatasetCatalog.get(name)] == [1, 0]
    assert [line for line in caplog.messages if "image_id" in line] == [
        "data set somebodys: 1 of 2 records have no image_id: numbered (said once)"
    ]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda r: r * 3, Kind.REPEATED_RECORD, r"have the image_id 1, both .*1\.png; training"),
        (second(image_id=1), Kind.SHARED_ID, r"have the image_id 1, .*1\.png and .*2\.png"),
        (second(image_id="1"), Kind.SHARED_ID, "some image_id are numbers, others text"),
        (
            lambda r: [r[0].update(image_id="a"), r[1].pop("image_id")] and None,
            Kind.SHARED_ID,
            "some image_id are numbers, others text or missing",
        ),
    ],
)
def test_ids_that_are_not_unique_train_and_are_refused_for_evaluation_alone(
    tmp_path: Path,
    registered: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    change: Change,
    kind: Kind,
    message: str,
) -> None:
    name = registered(changing(tmp_path, change))
    cfg = config(tmp_path, test=True)
    assert len(next(iter(Trainer.build_train_loader(cfg)))) == 2
    assert cli.main(["check-data", name]) == 0
    assert kind.text in capsys.readouterr().out
    for evaluates in (
        lambda: check_evaluation(cfg, nn.Identity(), load_all(cfg.DATASETS.TEST)),
        lambda: build_evaluator(cfg, load(name)),
        lambda: dataset_sources(name),
    ):
        with pytest.raises(DatasetError, match=f"data set {NAME}: .*{message}.*list each image on"):
            evaluates()


def test_an_image_is_asked_for_its_size_once(
    tmp_path: Path, registered: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "instseg.data.records.image_size", lambda file: asked.append(file) or (WIDTH, HEIGHT)
    )
    name = registered(changing(tmp_path, lambda r: image(height=KeyError)(r) or r * 2))
    config(tmp_path)
    for _ in range(3):
        assert len(DatasetCatalog.get(name)) == 4
    assert sorted(Path(file).name for file in asked) == ["1.png", "2.png"]


def test_a_generator_can_be_asked_for_twice(tmp_path: Path, registered: Callable[..., str]) -> None:
    given = iter(plain(tmp_path))
    name = registered(lambda: given)
    config(tmp_path)
    assert len(DatasetCatalog.get(name)) == len(DatasetCatalog.get(name)) == 2


def test_the_records_that_were_given_stay_as_they_are(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    records = plain(tmp_path)
    image(file_name=Path, height=KeyError)(records)
    each(segmentation={**RLE}, bbox=(5.0, 5.0, 15.0, 15.0))(records)
    before = copy.deepcopy(records)
    name = registered(lambda: records)
    build_evaluator(config(tmp_path, test=True), load(name))
    assert records == before


def test_what_a_registered_function_raises_keeps_its_traceback(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    registered(lambda: dict[str, int]()["typo"])
    with pytest.raises(KeyError, match="typo"):
        Trainer.build_train_loader(config(tmp_path))


def test_a_file_that_a_registered_function_does_not_find_is_named(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    registered((tmp_path / "gone.txt").read_text)
    with pytest.raises(DatasetError, match=f"{NAME}: there is no file .*gone.txt; set DETECTRON2"):
        Trainer.build_train_loader(config(tmp_path))


def test_keypoints_of_any_kind_become_a_list_of_their_own(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    points = np.array([10.5, 12.5, 2.0])
    name = registered(changing(tmp_path, first(keypoints=points)))
    config(tmp_path)
    for _ in range(2):
        given = DatasetCatalog.get(name)[1]["annotations"][0]["keypoints"]
        assert given == [10.5, 12.5, 2]
        given[0] = 0


def test_check_data_tells_what_trains_all_the_same(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    (checked,) = check_data([registered(changing(tmp_path, first(bbox=[5, 5, 5, 15])))])
    assert set(checked.report.ids) == {Kind.EMPTY_BOX, Kind.BOX_MISMATCH}


def test_check_data_says_that_crowds_alone_cannot_be_trained_on(
    tmp_path: Path, registered: Callable[..., str]
) -> None:
    (checked,) = check_data([registered(changing(tmp_path, each(iscrowd=1)))])
    assert Kind.NO_INSTANCE in checked.report.ids


def test_check_data_finds_all_of_it(tmp_path: Path, registered: Callable[..., str]) -> None:
    def spoil(records: Records) -> None:
        records[0]["annotations"][0]["category_id"] = 5
        records[1]["annotations"][0]["bbox"] = [15, 15, 5, 5]

    (checked,) = check_data([registered(changing(tmp_path, spoil))])
    assert set(checked.report.ids) == {Kind.UNKNOWN_CATEGORY, Kind.INVERTED_BOX}


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.builds(np.array, st.lists(st.integers(-9, 99), max_size=6))
    | st.builds(np.zeros, st.lists(st.integers(0, 9), max_size=3)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
FIELDS = ["bbox", "bbox_mode", "segmentation", "category_id", "iscrowd"]


@given(
    field=st.sampled_from([*FIELDS, "file_name", "image_id", "height", "width", "annotations"]),
    value=odd | st.lists(st.floats() | st.integers(-50, 50), min_size=4, max_size=8),
)
def test_whatever_a_record_holds_it_is_refused_or_can_be_trained_on(field: str, value: Any) -> None:
    with TemporaryDirectory() as folder:
        records = plain(Path(folder))
        change = first if field in FIELDS else second
        change(**{field: value})(records)
        MetadataCatalog.get("odd").thing_classes = ["cat", "dog"]
        try:
            checked = CheckedRecords("odd", lambda: records)()
            build.check_files("odd", checked)
        except DatasetError:
            return
        mapper = build_train_mapper(fuzz_config(), augment=False)
        for record in checked:
            try:
                sample = mapper(copy.deepcopy(record))
            except ImageError:  # of another size than the record says
                continue
            assert len(sample["instances"]) <= len(record["annotations"])


@functools.cache
def fuzz_config() -> CfgNode:
    words = ["INPUT.MASK_FORMAT", "bitmask", "MODEL.MASK_ON", False]
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)


def test_a_file_registered_with_detectron2_is_read_as_one_of_ours(tmp_path: Path) -> None:
    given = changed("annotations", 0, "bbox", to=[5, 5, -3, -3])
    file, root = build.parse_coco_name(write_set(tmp_path, given))
    register_coco_instances(NAME, {}, Path(file), Path(root))
    try:
        with pytest.raises(DatasetError, match=r"annotation 11 of image 1 .* of negative size"):
            Trainer.build_train_loader(config(tmp_path))
        assert [set(checked.report.ids) for checked in check_data([NAME])] == [{Kind.INVERTED_BOX}]
        write_set(tmp_path, changed("annotations", 0, "bbox", to=KeyError))
        cfg = config(tmp_path, "INPUT.MASK_FORMAT", "bitmask")
        assert len(next(iter(Trainer.build_train_loader(cfg)))) == 2
    finally:
        DatasetCatalog.pop(NAME, None)
        MetadataCatalog.pop(NAME, None)


def test_a_file_registered_with_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    file, _ = build.parse_coco_name(write_set(tmp_path, content()))
    register_coco_instances(NAME, {}, file, str(tmp_path / "gone"))
    try:
        with pytest.raises(DatasetError, match="the image folder .*gone does not exist"):
            load(NAME)
    finally:
        DatasetCatalog.pop(NAME, None)
        MetadataCatalog.pop(NAME, None)
