"""Configuration files and overrides: safe, and clear about what is wrong."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import instseg
from instseg.config.classes import check_classes, num_classes_key
from instseg.config.files import load_yaml
from instseg.config.nodes import check_names
from instseg.data.dataset import load_all
from instseg.errors import ConfigError, DatasetError
from instseg.training.trainer import Trainer


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.MAX_ITR", "1"], "unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),
        (["MAX_ITER", "1"], "unknown key MAX_ITER; did you mean SOLVER.MAX_ITER?"),
        (
            ["SOLVER.MAX_ITER", "1.5"],
            "SOLVER.MAX_ITER must be of type int (like 40000), found float 1.5",
        ),
        (
            ["DATASETS.TRAIN", "a"],
            "DATASETS.TRAIN must be of type tuple (like ()), found str a; write \"('a',)\"",
        ),
        (["SOLVER.MAX_ITER"], "overrides must be pairs KEY VALUE, found 1 words: SOLVER.MAX_ITER"),
        (["MODEL", "1"], "MODEL is a group of keys"),
        (["SOLVER.MAX_ITER", "2", "--resume"], "--resume is an option; put options before"),
        (["MODEL.META_ARCHITECTURE", "None"], "must be of type str (like GeneralizedRCNN), found"),
        (["DATASETS.TRAIN", None], "DATASETS.TRAIN must be of type tuple (like ()), found no val"),
        (["MODEL.DEVICE.X", "1"], "unknown key MODEL.DEVICE.X"),
    ],
)
def test_a_wrong_override_names_what_was_found_and_the_nearest_key(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        instseg.get_cfg().merge_from_list(overrides)
    assert message in str(caught.value)


def test_a_typo_in_a_file_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "VERSION: 2\nMODEL:\n  MASK_OM: True\n")
    with pytest.raises(
        ConfigError, match="config.yaml: unknown key MODEL.MASK_OM; did you mean MODEL.MASK_ON"
    ):
        instseg.get_cfg().merge_from_file(path)


def test_a_wrong_type_in_a_file_names_file_and_key(tmp_path: Path) -> None:
    path = write(tmp_path, "VERSION: 2\nSOLVER:\n  MAX_ITER: many\n")
    with pytest.raises(ConfigError, match="config.yaml: SOLVER.MAX_ITER must be of type int"):
        instseg.get_cfg().merge_from_file(path)


def test_a_value_where_a_group_is_expected_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "VERSION: 2\nMODEL: GeneralizedRCNN\n")
    with pytest.raises(ConfigError, match="MODEL is a group of keys"):
        instseg.get_cfg().merge_from_file(path)


def test_yaml_never_executes_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = write(
        tmp_path, f'VERSION: 2\nOUTPUT_DIR: !!python/object/apply:os.system ["touch {marker}"]\n'
    )
    for unsafe in (False, True):
        with pytest.raises(ConfigError, match="never tags that execute|True would execute code"):
            instseg.get_cfg().merge_from_file(path, allow_unsafe=unsafe)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "found a list"),
        ("just text", "found a str"),
        ("MODEL: [1, 2\n", "not a YAML file"),
        ("1: 2\n", "expected `KEY: value` lines"),
        ("MODEL: &a\n  MASK_ON: *a\n", "config.yaml: "),
        ("MODEL:\n", "a group of keys has a wrong type"),
        ("SEED: !!bool zz\n", "not a YAML file"),
        ("SEED: !!int ''\n", "not a YAML file"),
        ("SEED: !!float ''\n", "not a YAML file"),
        ("SEED: !!timestamp a\n", "not a YAML file"),
        ("VERSION: -3\n", "VERSION is -3; expected 2"),
        ("VERSION: three\n", "VERSION is 'three'; expected 2"),
        ("MODEL: {META_ARCHITECTURE: null}\n", "META_ARCHITECTURE must be of type str .*no value"),
        ("DATASETS: {TRAIN: null}\n", "DATASETS.TRAIN must be of type tuple .like .... found no"),
        ("DATASETS: {TRAIN: 'None'}\n", "DATASETS.TRAIN must be of type tuple .like .... found"),
        ('_BASE_: "a\\0b.yaml"\n', "is no file name .named as _BASE_ of .*config.yaml"),
        ("_BASE_: 5\n", "_BASE_ is 5; expected a file name or a list of them"),
        ("_BASE_: /dev/zero\n", "/dev/zero: is no regular file .named as _BASE_ of .*config.yaml"),
        ("SEED: 1\nVERSION: 2\nSEED: 1\n", "SEED appears twice, in lines 1 and 3; YAML"),
        ("MODEL: {MASK_ON: 1, 'MASK_ON': 0}\n", "MASK_ON appears twice, in lines 1 and 1"),
        (f"SEED: '{'-' * 10000}1'\n", "nested too deeply"),
        ("_BASE_: [1]\n", "_BASE_ is .1.; expected a file name or a list of them"),
    ],
)
def test_a_malformed_file_is_a_config_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instseg.get_cfg().merge_from_file(write(tmp_path, text))


def test_what_one_group_says_others_may_say_as_well(tmp_path: Path) -> None:
    shared = "&x {LR_FACTOR: &y 2.0}\n"
    text = f"OTHER: {shared}SOLVER:\n  BASE_LR: *y\n  GAMMA: *y\nMODEL:\n  <<: *x\n  <<: *x\n"
    content = load_yaml(write(tmp_path, text))
    assert content["SOLVER"] == {"BASE_LR": 2.0, "GAMMA": 2.0}
    assert content["MODEL"] == content["OTHER"] == {"LR_FACTOR": 2.0}


@pytest.mark.parametrize("count", [3000, 10000])
def test_an_override_that_python_cannot_parse_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="a value among the overrides is nested too deeply"):
        instseg.get_cfg().merge_from_list(["SEED", "not " * count + "1"])


def test_a_missing_file_names_the_nearest_installed_config() -> None:
    with pytest.raises(
        ConfigError, match="does not exist; did you mean mask_rcnn/mask_rcnn_shapes.yaml"
    ):
        instseg.load_cfg("mask_rcnn/mask_rcnn_shape.yaml")


def test_a_folder_is_refused_as_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        instseg.load_cfg(tmp_path)


def test_cyclic_bases_are_shown_as_a_cycle(tmp_path: Path) -> None:
    a = write(tmp_path, "_BASE_: b.yaml\n", "a.yaml")
    write(tmp_path, "_BASE_: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="_BASE_ is cyclic: .*a.yaml -> .*b.yaml -> .*a.yaml"):
        instseg.get_cfg().merge_from_file(a)


def test_a_missing_base_names_who_asked_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "_BASE_: gone.yaml\n")
    with pytest.raises(
        ConfigError, match="gone.yaml: cannot be read .named as _BASE_ of .*config.yaml"
    ):
        instseg.get_cfg().merge_from_file(path)


@pytest.mark.parametrize("key", ["SOLVER: {MAX_ITER: %s}", "DATASETS: {TRAIN: [%s]}", "_BASE_: %s"])
@pytest.mark.parametrize("merged", [False, True], ids=["lists", "merge keys"])
def test_aliases_of_aliases_are_refused_in_a_line(tmp_path: Path, key: str, merged: bool) -> None:
    """Written out, they have ten to the power of thirty values."""
    value = "{a: 1}" if merged else "1"
    for level in range(30):
        several = ", ".join([f"&a{level} {value}", *[f"*a{level}"] * 9])
        value = f"{{<<: [{several}]}}" if merged else f"[{several}]"
    with pytest.raises(ConfigError, match="config.yaml: values are too many") as caught:
        instseg.get_cfg().merge_from_file(write(tmp_path, f"VERSION: 2\n{key % value}\n"))
    assert len(str(caught.value)) < 500


def test_a_long_value_is_cut_in_a_message(tmp_path: Path) -> None:
    for text in ("SOLVER: {MAX_ITER: %s}", "DATASETS: {TRAIN: [%s]}", "_BASE_: [%s]"):
        path = write(tmp_path, "VERSION: 2\n" + text % ([[1] * 1000] * 9))
        with pytest.raises(ConfigError) as caught:
            instseg.load_cfg(path)
        assert len(str(caught.value)) < 600


def test_a_base_that_many_files_name_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, "VERSION: 2\nSOLVER: {MAX_ITER: 3}\n", "d0.yaml")
    for depth in range(1, 60):
        base = f"d{depth - 1}.yaml"
        path = write(tmp_path, f"_BASE_: [{base}, ./{base}, {base}]\n", f"d{depth}.yaml")
    assert instseg.load_cfg(path).SOLVER.MAX_ITER == 3


def test_a_file_changes_nothing_in_what_others_share_with_it(tmp_path: Path) -> None:
    write(tmp_path, "VERSION: 2\nSOLVER: {MAX_ITER: 3}\n", "a.yaml")
    write(tmp_path, "_BASE_: a.yaml\nSOLVER: {MAX_ITER: 4}\n", "b.yaml")
    cfg = instseg.load_cfg(write(tmp_path, "_BASE_: [b.yaml, a.yaml]\n"))
    assert cfg.SOLVER.MAX_ITER == 3


def test_a_file_of_the_first_version_of_detectron2s_keys_is_understood(tmp_path: Path) -> None:
    text = "VERSION: 1\nMODEL: {WEIGHT: model.pth}\nTEST: {DETECTIONS_PER_IMG: 7}\n"
    cfg = instseg.load_cfg(write(tmp_path, text))
    assert (cfg.MODEL.WEIGHTS, cfg.TEST.DETECTIONS_PER_IMAGE) == ("model.pth", 7)


def test_a_key_that_was_renamed_is_refused_with_the_new_one(tmp_path: Path) -> None:
    message = r"TEST.CONTEST_METRIC was renamed to TEST.METRICS; .* name 'contest' in it"
    with pytest.raises(ConfigError, match=message):
        instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", ["TEST.CONTEST_METRIC", "True"])
    with pytest.raises(ConfigError, match=message):
        instseg.load_cfg(write(tmp_path, "TEST: {CONTEST_METRIC: True}\n"))


@pytest.mark.parametrize(
    ("chosen", "metrics"),
    [
        ((), ("coco",)),
        (("CONTEST_METRIC", "TRACK_METRIC"), ("coco", "contest", "tracks")),
        (("PROPOSALS", "CONTEST_METRIC"), ("proposals", "contest")),
    ],
)
def test_the_config_yaml_of_an_earlier_version_is_understood(
    tmp_path: Path, chosen: tuple[str, ...], metrics: tuple[str, ...]
) -> None:
    old = "PROPOSALS", *(f"{x}_METRIC" for x in ("CONTEST", "VOC", "TRACK", "LEAF", "SEMANTIC"))
    lines = "".join(f"  {key}: {key in chosen}\n" for key in old)
    assert instseg.load_cfg(write(tmp_path, f"VERSION: 2\nTEST:\n{lines}")).TEST.METRICS == metrics


@pytest.fixture(scope="module")
def defaults() -> Any:
    return instseg.get_cfg()


@given(content=st.binary(max_size=200))
def test_random_bytes_as_config_only_raise_config_errors(defaults: Any, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file, contextlib.suppress(ConfigError):
        file.write(content)
        file.flush()
        defaults.merge_from_file(file.name)


def test_later_bases_and_the_file_itself_win(tmp_path: Path) -> None:
    write(tmp_path, "VERSION: 2\nSOLVER:\n  MAX_ITER: 1\n  IMS_PER_BATCH: 3\n", "a.yaml")
    write(tmp_path, "SOLVER:\n  MAX_ITER: 2\n", "b.yaml")
    cfg = instseg.load_cfg(write(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSEED: 4\n"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED) == (2, 3, 4)


def test_the_default_device_is_one_this_machine_has() -> None:
    assert instseg.get_cfg().MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("key", "name", "suggestion"),
    [
        (
            "MODEL.META_ARCHITECTURE",
            "GeneralisedRCNN",
            "GeneralizedRCNN (detectron2.modeling.meta_arch.rcnn)",
        ),
        (
            "MODEL.ROI_HEADS.NAME",
            "StandardROIHead",
            "StandardROIHeads (detectron2.modeling.roi_heads.roi_heads)",
        ),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn", "build_resnet_fpn_backbone"),
        ("MODEL.RPN.HEAD_NAME", "StandardRPN", "StandardRPNHead"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "AnchorGenerator", "DefaultAnchorGenerator"),
        ("MODEL.ROI_KEYPOINT_HEAD.NAME", "KRCNN", "KRCNNConvDeconvUpsampleHead"),
        ("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPN", "SemSegFPNHead"),
    ],
)
def test_an_unregistered_part_lists_close_names_and_their_home(
    key: str, name: str, suggestion: str
) -> None:
    cfg = instseg.get_cfg()
    cfg.merge_from_list([key, name])
    with pytest.raises(ConfigError) as caught:
        check_names(cfg)
    assert key in str(caught.value)
    assert suggestion in str(caught.value)


def test_a_class_count_that_differs_from_the_data_names_both_numbers_and_the_key() -> None:
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", 80])
    with pytest.raises(
        ConfigError, match="shapes_val has 3 classes, MODEL.ROI_HEADS.NUM_CLASSES is 80"
    ):
        check_classes(cfg, load_all(cfg.DATASETS.TEST))


def test_training_and_test_sets_with_other_classes_are_refused() -> None:
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    with pytest.raises(ConfigError, match="shapes_val and shapes_hard_val differ in their classes"):
        check_classes(cfg, load_all(("shapes_val", "shapes_hard_val")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["DATASETS.TRAIN", ("shapes_train", 5)], "DATASETS.TRAIN is .* 5.; expected names"),
        (["DATASETS.SHAPES_SIZE", 1], "DATASETS.SHAPES_SIZE is 1; expected 16 to 4096 pixels"),
        (["DATASETS.SHAPES_SIZE", 10**9], "expected 16 to 4096 pixels"),
    ],
)
def test_impossible_data_sets_are_refused(overrides: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", overrides)


@pytest.mark.parametrize("content", ["null", "3", "[]", '{"images": []}', "{"])
def test_a_json_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content, "instances.json")
    name = f"coco:{path}"
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", ["DATASETS.TRAIN", (name,)])
    with pytest.raises(DatasetError, match="is not JSON|expected the COCO instance format"):
        check_classes(cfg, load_all((name,)))


def test_data_that_is_not_on_this_disk_is_named() -> None:
    cfg = instseg.load_cfg(
        "mask_rcnn/mask_rcnn_shapes.yaml", ["DATASETS.TRAIN", ("coco_2017_val",)]
    )
    with pytest.raises(DatasetError, match="set DETECTRON2_DATASETS to the folder that holds it"):
        Trainer.build_train_loader(cfg)


def test_an_unknown_data_set_names_close_ones() -> None:
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    with pytest.raises(
        DatasetError, match="no data set is called 'shape_train'; did you mean shapes_train"
    ):
        check_classes(cfg, load_all(("shape_train",)))


def test_the_class_count_key_follows_the_architecture() -> None:
    cfg = instseg.get_cfg()
    assert num_classes_key(cfg) == "MODEL.ROI_HEADS.NUM_CLASSES"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert num_classes_key(cfg) == "MODEL.RETINANET.NUM_CLASSES"


def test_a_configuration_survives_dump_and_reload(tmp_path: Path) -> None:
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    again = instseg.load_cfg(write(tmp_path, cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
