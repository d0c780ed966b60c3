"""The classes of a model: read from anywhere, never those of another model."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import MetadataCatalog

import instseg
from instseg.categories import OBJECT, Categories
from instseg.config.classes import classes_option, model_categories, training_categories
from instseg.config.rules import check_values
from instseg.data.build import register_dataset
from instseg.data.categories import known_categories
from instseg.data.dataset import load
from instseg.errors import ConfigError
from instseg.training.launch import write_config
from tests.inference.test_predictor import tiny_cfg

SHAPES = ["DATASETS.TEST", "('shapes_val',)"]
OURS = Categories((7, 12, 30), ("bolt", "nut", "washer"))
BAD_CATEGORIES = [
    5,
    "cat",
    {"id": 1},
    [1, 2, 3],
    [{"id": 1}],
    [{"name": "a"}],
    [{"id": "1", "name": "a"}],
    [{"id": True, "name": "a"}],
    [{"id": 1.5, "name": "a"}],
    [{"id": float("nan"), "name": "a"}],
    [{"id": float("inf"), "name": "a"}],
    [{"id": 10**400, "name": "a"}],
    [{"id": 1, "name": None}],
    [{"id": 1, "name": ["a"]}],
    [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}],
    [{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}],
    [{"id": 0, "name": "a"}] * 200_000,
    torch.zeros(3),
]


@pytest.mark.parametrize("value", BAD_CATEGORIES, ids=lambda value: str(value)[:40])
def test_what_is_no_list_of_categories_is_refused(value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        Categories.of_coco(value)
    assert len(str(caught.value)) < 500


def test_categories_keep_their_order_unless_asked_for_that_of_the_ids() -> None:
    entries = [{"id": 30, "name": "c"}, {"id": 7.0, "name": "a", "supercategory": "x"}]
    assert Categories.of_coco(entries) == Categories((30, 7), ("c", "a"))
    assert Categories.of_coco(entries, by_id=True) == Categories((7, 30), ("a", "c"))


def test_plain_values_go_there_and_back() -> None:
    assert Categories.of_coco(json.loads(json.dumps(OURS.as_coco()))) == OURS


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("traffic light", "traffic light"),
        ("Käfer 🪲", "Käfer 🪲"),
        ("a\nb\x1b[31m\0", "a?b?[31m?"),
        ("\ud83d", "?"),
        ("gpj\u202egnp", "gpj?gnp"),
        ("", "class 0"),
        (" \t", "?"),
        ("x" * 2000, "x" * 1000),
    ],
)
def test_a_name_is_one_line_of_text(name: str, shown: str) -> None:
    [stored_name] = Categories.of_coco([{"id": 1, "name": name}]).names
    assert stored_name == shown
    stored_name.encode()


def test_numbers_and_ids_are_found_from_each_other() -> None:
    assert [OURS.id_of(n) for n in range(4)] == [7, 12, 30, 3]
    assert [OURS.number_of(key) for key in (7, 12, 30, 3)] == [0, 1, 2, 3]
    assert [OURS.name_of(n) for n in range(4)] == ["bolt", "nut", "washer", "class 3"]


@pytest.mark.parametrize(
    ("name", "ids", "first"),
    [
        ("shapes_val", range(1, 4), "circle"),
        ("shapes_hard_val", range(1, 5), "circle"),
        ("shapes_video_val", range(1, 4), "circle"),
        ("sbd_val", range(1, 21), "aeroplane"),
        ("voc_2012_instances_train", range(1, 21), "aeroplane"),
        ("cvppp_a1_val", [1], "leaf"),
    ],
)
def test_built_in_sets_have_the_ids_of_their_files(name: str, ids: Any, first: str) -> None:
    instseg.get_cfg()
    categories = known_categories(name)
    assert categories is not None
    assert list(categories.ids) == list(ids)
    assert categories.names[0] == first


def test_coco_has_its_own_ids_without_being_there() -> None:
    instseg.get_cfg()
    categories = known_categories("coco_2017_val")
    assert categories is not None
    assert (len(categories), categories.ids[-1], categories.names[-1]) == (80, 90, "toothbrush")


def test_sets_in_files_have_the_ids_of_the_file(data_root: Path) -> None:
    instseg.get_cfg()
    categories = load("coco_mini_val").categories
    assert categories is not None and categories.ids[-1] == 90
    assert load("nuclei_val").categories == Categories((1,), ("nucleus",))


def coco_file(path: Path, categories: Any) -> str:
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return str(path)


def test_a_file_tells_its_classes_without_its_images(tmp_path: Path) -> None:
    file = coco_file(tmp_path / "a.json", OURS.as_coco()[::-1])
    name = f"coco:{file}:{tmp_path}/gone"
    register_dataset(name)
    assert known_categories(name) == OURS


@pytest.mark.parametrize("name", ["nowhere", 5, None, "coco:gone.json:."])
def test_what_is_not_there_tells_nothing(name: Any) -> None:
    instseg.get_cfg()
    register_dataset(str(name))
    assert known_categories(name) is None
    assert "nowhere" not in MetadataCatalog.list()


def test_the_user_counts_before_the_weights_before_the_configuration_before_the_data_set() -> None:
    cfg = tiny_cfg("DATASETS.TEST", "('shapes_val',)")
    chosen, saved, configured = (Categories.of_names(names) for names in ("abc", "def", "ghi"))
    content = {"categories": saved.as_coco()}
    data_set = model_categories(cfg, {})
    cfg.MODEL.CATEGORIES = configured.as_coco()
    assert model_categories(cfg, content, chosen) == chosen
    assert model_categories(cfg, content) == saved
    assert model_categories(cfg, {}) == configured
    assert data_set == Categories((1, 2, 3), ("circle", "square", "triangle"))


def test_names_alone_get_the_ids_of_the_set_that_has_these_names() -> None:
    cfg = tiny_cfg("DATASETS.TEST", "('shapes_val',)")
    names = ["circle", "square", "triangle"]
    assert model_categories(cfg, {"class_names": names}) == Categories((1, 2, 3), tuple(names))
    assert model_categories(cfg, {"class_names": names[::-1]}).ids == (0, 1, 2)


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        ({}, ["DATASETS.TEST", "('coco_2017_val',)"]),
        ({}, ["MODEL.CATEGORIES", OURS.as_coco()[:2]]),
        ({"class_names": ["a", "b"]}, []),
        ({"class_names": ["a", "b"]}, SHAPES),
        ({"categories": OURS.as_coco()[:2]}, SHAPES),
        *(({"categories": value}, SHAPES) for value in BAD_CATEGORIES),
        *(({"class_names": x}, SHAPES) for x in (5, "cat", [1, None], {"a": 1}, torch.ones(2))),
    ],
    ids=lambda value: str(value)[:40],
)
def test_names_of_other_classes_are_never_used_and_that_is_said(
    content: dict[str, Any], overrides: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_cfg("DATASETS.TEST", "()", *overrides)
    with caplog.at_level(logging.WARNING, "instseg"):
        categories = model_categories(cfg, content)
    assert categories.names == ("class 0", "class 1", "class 2")
    assert categories.ids == (0, 1, 2) and not categories.named
    assert sum("nothing names the 3 classes of this model" in m for m in caplog.messages) == 1
    assert len(caplog.messages) <= 2
    assert all("\n" not in message and len(message) < 500 for message in caplog.messages)


def test_a_model_that_knows_no_classes_finds_objects() -> None:
    cfg = instseg.load_cfg("deepmask/deepmask_shapes.yaml")
    assert model_categories(cfg, {"categories": OURS.as_coco()}) == OBJECT
    with pytest.raises(ConfigError, match="--classes: this model knows no classes"):
        model_categories(cfg, {}, OURS)


def test_another_number_of_classes_on_the_command_line_is_refused_with_both() -> None:
    message = r"--classes names 4 classes, the model has 3 \(MODEL.ROI_HEADS.NUM_CLASSES\)"
    with pytest.raises(ConfigError, match=message):
        model_categories(tiny_cfg(), {}, Categories.of_names("abcd"))


def test_classes_on_the_command_line_are_names_in_their_order() -> None:
    assert classes_option("washer, traffic light,nut").names == ("washer", "traffic light", "nut")


def test_classes_of_a_file_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    file = coco_file(tmp_path / "classes.JSON", OURS.as_coco()[::-1])
    assert classes_option(file) == OURS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has an empty name; expected NAME,NAME,... or FILE.json"),
        ("a,,b", "has an empty name"),
        ("a,b,a", "has the name 'a' twice"),
        ("gone.json", "--classes: data set gone.json cannot be read: No such file"),
        ("folder.json", "--classes: data set folder.json cannot be read: "),
        ("text.json", "--classes: data set text.json is not JSON"),
        ("empty.json", "--classes empty.json: categories: expected a list of"),
        ("list.json", "--classes list.json: categories: expected a list of"),
        ("results.json", "--classes results.json: categories: a category has the id None"),
    ],
)
def test_classes_that_cannot_be_used_are_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("text.json").write_text("<html>")
    Path("empty.json").write_text("{}")
    Path("list.json").write_text("[]")
    Path("results.json").write_text('[{"image_id": 1, "category_id": 2}]')
    with pytest.raises(ConfigError) as caught:
        classes_option(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", BAD_CATEGORIES[3:11])
def test_categories_of_a_configuration_are_checked_at_the_start(value: Any) -> None:
    cfg = tiny_cfg()
    cfg.MODEL.CATEGORIES = value
    with pytest.raises(ConfigError, match="MODEL.CATEGORIES: "):
        check_values(cfg)


@pytest.mark.parametrize("categories", [OURS, Categories.unnamed(3), None])
def test_the_config_beside_a_training_is_read_with_its_categories(
    categories: Categories | None, tmp_path: Path
) -> None:
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('coco_2017_val',)")
    write_config(cfg, categories)
    read = instseg.load_cfg(tmp_path / "config.yaml")
    expected = OURS if categories == OURS else Categories.unnamed(3)
    assert model_categories(read, {}) == expected
    assert cfg.MODEL.CATEGORIES == []


def test_a_model_without_classes_is_trained_for_objects() -> None:
    cfg = instseg.load_cfg("deepmask/deepmask_shapes.yaml")
    assert training_categories(cfg, load(cfg.DATASETS.TRAIN[0])) == OBJECT
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    classes = training_categories(cfg, load(cfg.DATASETS.TRAIN[0]))
    assert classes == Categories((1, 2, 3), ("circle", "square", "triangle"))
