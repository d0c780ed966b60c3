"""Exported networks give the detections of the model that they come from."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instseg.categories import Categories
from instseg.cli import main
from instseg.config.files import parse_yaml
from instseg.config.nodes import CfgNode, get_cfg
from instseg.data.intensity import Intensity
from instseg.errors import CheckpointError, ConfigError
from instseg.export import ExportedPredictor, export, exporting
from instseg.inference.predictor import Predictor
from tests.inference.test_predictor import tiny_cfg as mask_rcnn_cfg
from tests.support.exported import Case
from tests.support.yolact_tiny import CONFIGS, PHOTO, TINY, decided, same_detections, tiny_predictor

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401

    VERSION = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
except ImportError:
    VERSION = (0, 0)
HAS_ONNX = VERSION > (0, 0)
ONNX = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra 'export'")
PAPERS = [
    pytest.param("yolact", marks=ONNX),
    pytest.param(
        "yolact_plus",
        marks=[ONNX, pytest.mark.skipif(VERSION < (1, 25), reason="onnxruntime has no DeformConv")],
    ),
]
# Thresholds for no instance, for one and for as many as there are.
COUNTS = {
    0: ["MODEL.YOLACT.SCORE_THRESH_TEST", 1.0],
    1: ["TEST.DETECTIONS_PER_IMAGE", 1],
    50: [],
}


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, exported_as: Callable[[str], Case]) -> Case:
    return exported_as(request.param)


papers = pytest.mark.parametrize("case", PAPERS, indirect=True)


def with_settings(predictor: Predictor, other: Predictor) -> None:
    predictor.model.detection_settings = other.model.detection_settings


@papers
@pytest.mark.parametrize("count", COUNTS)
def test_onnxruntime_gives_the_detections_of_the_model(case: Case, count: int) -> None:
    exported = ExportedPredictor(case.path, overrides=COUNTS[count])
    with_settings(case.predictor, exported)
    expected = case.predictor(PHOTO)
    assert len(expected["instances"]) == count
    same_detections(exported(PHOTO), expected)


@papers
def test_masks_are_cropped_unless_the_configuration_says_otherwise(case: Case) -> None:
    pixels = []
    for crop in (True, False):
        exported = ExportedPredictor(case.path, overrides=["MODEL.YOLACT.CROP_MASKS_TEST", crop])
        with_settings(case.predictor, exported)
        result = exported(PHOTO)
        same_detections(result, case.predictor(PHOTO))
        pixels.append(result["instances"].pred_masks.sum())
    assert pixels[0] < pixels[1]


@papers
def test_one_file_takes_batches_of_any_size(case: Case) -> None:
    exported = ExportedPredictor(case.path)
    with_settings(case.predictor, exported)
    for batch in (1, 3):
        exported.batch_size = batch
        images = [PHOTO, PHOTO[:, ::-1], PHOTO[::-1]]
        for result, image in zip(exported(images), images, strict=True):
            same_detections(result, case.predictor(image))


@papers
def test_inputs_and_outputs_have_their_names_and_the_file_is_valid(case: Case) -> None:
    model = onnx.load(case.path)
    onnx.checker.check_model(model, full_check=True)
    assert [x.name for x in model.graph.input] == ["images"]
    assert [x.name for x in model.graph.output] == list(case.predictor.model.raw_names)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {x.domain for x in model.graph.node} == {""}


@papers
def test_the_file_carries_categories_and_configuration_but_no_paths(case: Case) -> None:
    exported = ExportedPredictor(case.path)
    assert exported.categories == Categories((7, 12, 30), ("a", "b", "c"))
    assert exported.cfg.INPUT.SQUARE_SIZE == 72
    assert exported.cfg.MODEL.WEIGHTS == exported.cfg.OUTPUT_DIR == ""
    assert b"site-packages" not in case.path.read_bytes()


@pytest.mark.parametrize("case", PAPERS[:1], indirect=True)
def test_intensities_are_stored_and_applied(case: Case, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    keys = ["INPUT.NORMALIZE", "range", "INPUT.NORMALIZE_RANGE", (500.0, 40000.0)]
    exported = ExportedPredictor(case.path, overrides=[*keys, "INPUT.CHANNELS", (1, 1, 0)])
    assert exported.intensity == Intensity("range", (500.0, 40000.0), (1, 1, 0))
    tifffile.imwrite(tmp_path / "a.tif", PHOTO.astype(np.uint16) * 200, photometric="rgb")
    ours = copy.copy(case.predictor)
    ours.intensity = exported.intensity
    expected = ours(tmp_path / "a.tif")
    assert len(expected["instances"]) > 0
    same_detections(exported(tmp_path / "a.tif"), expected)
    stored = parse_yaml(json.loads(exporting._metadata(exported, [], False))["config"], "it")
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(stored))
    assert Intensity.of(cfg) == exported.intensity


@pytest.mark.parametrize("case", PAPERS[1:], indirect=True)
def test_the_re_scoring_network_is_a_file_of_its_own(case: Case, tmp_path: Path) -> None:
    assert case.files == [case.path, case.path.with_name("yolact_plus.maskiou_net.onnx")]
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(case.path.read_bytes())
    with pytest.raises(CheckpointError, match="alone.maskiou_net.onnx: no such file"):
        ExportedPredictor(alone)


def test_an_archive_of_torch_export_gives_the_outputs_of_the_network_and_the_classes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "yolact.pt2"
    arguments = ["--config-file", CONFIGS["yolact"], "--format", "torch_export"]
    arguments += ["--allow-partial", "--output", str(path), "--classes", "bolt,nut,washer"]
    assert main(["export", *arguments, *map(str, TINY)]) == 0
    extra = {"instseg": ""}
    program = torch.export.load(path, extra_files=extra)
    metadata = json.loads(extra["instseg"])
    assert metadata["children"] == []
    assert [entry["name"] for entry in metadata["categories"]] == ["bolt", "nut", "washer"]
    model = tiny_predictor("yolact").model
    state = {k.removeprefix("model."): v for k, v in program.state_dict.items()}
    model.load_state_dict(state)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 72, 72)
        for ours, theirs in zip(program.module()(images), model.raw(images), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow  # a deformable ResNet-50 takes its time to trace
@pytest.mark.parametrize("paper", PAPERS)
def test_the_networks_of_the_shapes_configurations_are_exported(paper: str, tmp_path: Path) -> None:
    predictor = Predictor(CONFIGS[paper], overrides=["MODEL.DEVICE", "cpu"])
    decided(predictor.model)
    path = tmp_path / "network.onnx"
    export(predictor, "onnx", path)
    exported = ExportedPredictor(path, overrides=["MODEL.YOLACT.SCORE_THRESH_TEST", 0.0])
    with_settings(predictor, exported)
    same_detections(exported(PHOTO), predictor(PHOTO))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("tensorrt", "x.onnx", "--format is 'tensorrt'; expected one of onnx, torch_export"),
        ("onnx", "x.pt2", "the name of a onnx file must end in .onnx"),
    ],
)
def test_an_unknown_format_and_a_wrong_extension_are_refused(
    name: str, file: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(tiny_predictor("yolact"), name, Path(file))


def test_a_model_without_a_network_of_fixed_shape_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="GeneralizedRCNN cannot be exported: .* only its backbone"
    ):
        export(Predictor(mask_rcnn_cfg()), "onnx", Path("x.onnx"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx.*the extra 'export'"):
        export(tiny_predictor("yolact"), "onnx", Path("x.onnx"))


def test_an_archive_of_torch_export_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can execute code"):
        ExportedPredictor(tmp_path / "x.pt2")


@ONNX
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"nonsense", "cannot be run")],
)
def test_a_missing_or_damaged_file_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        ExportedPredictor(path)


@papers
def test_a_file_of_others_is_refused(case: Case, tmp_path: Path) -> None:
    model: Any = onnx.load(case.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="was not written by `instseg export`"):
        ExportedPredictor(tmp_path / "foreign.onnx")


@pytest.mark.parametrize("case", PAPERS[:1], indirect=True)
@pytest.mark.parametrize(
    "told",
    [
        {"categories": 5},
        {"categories": [{"id": 1, "name": "a"}]},
        {"categories": [{"id": 1, "name": "a"}] * 3},
        {"categories": None, "class_names": [1, 2, 3]},
    ],
)
def test_categories_of_a_file_that_cannot_be_used_are_left(
    case: Case, told: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = onnx.load(case.path)
    model.metadata_props[0].value = json.dumps(json.loads(model.metadata_props[0].value) | told)
    onnx.save(model, tmp_path / "odd.onnx")
    exported = ExportedPredictor(tmp_path / "odd.onnx")
    assert exported.categories == Categories.unnamed(3)
    assert exported.class_names is None
    assert caplog.text.count("nothing names the 3 classes of this model") == 1


@pytest.mark.parametrize("case", PAPERS[:1], indirect=True)
def test_names_alone_of_an_older_file_are_read(case: Case, tmp_path: Path) -> None:
    model: Any = onnx.load(case.path)
    content = json.loads(model.metadata_props[0].value)
    del content["categories"]
    model.metadata_props[0].value = json.dumps(content | {"class_names": ["a", "b", "c"]})
    onnx.save(model, tmp_path / "old.onnx")
    assert ExportedPredictor(tmp_path / "old.onnx").class_names == ["a", "b", "c"]


@papers
def test_an_exported_network_predicts_by_tiles_as_the_model_does(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "instseg")
    exported = ExportedPredictor(case.path)
    with_settings(case.predictor, exported)
    image = np.tile(PHOTO, (3, 3, 1))
    instances, expected = (
        predictor.predict_tiled(image, 80)["instances"] for predictor in (exported, case.predictor)
    )
    assert caplog.text.count("tiles overlap by 37 pixels: the longest side of an instance") == 2
    assert len(instances) == len(expected) > 0
    torch.testing.assert_close(instances.scores, expected.scores, rtol=1e-4, atol=1e-5)
    changed = instances.pred_masks.to_dense() != expected.pred_masks.to_dense()
    assert changed.float().mean() < 1e-4


@pytest.mark.parametrize("case", PAPERS[:1], indirect=True)
@pytest.mark.parametrize("value", [None, 0, "x", 1.5])
def test_a_largest_instance_that_is_no_number_of_pixels_counts_as_unknown(
    case: Case, value: Any, tmp_path: Path
) -> None:
    model: Any = onnx.load(case.path)
    content = json.loads(model.metadata_props[0].value)
    assert content["largest_instance"] == 5
    model.metadata_props[0].value = json.dumps(content | {"largest_instance": value})
    onnx.save(model, tmp_path / "odd.onnx")
    assert ExportedPredictor(tmp_path / "odd.onnx").largest_instance is None


def test_another_number_of_classes_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-file", CONFIGS["yolact"], "--format", "torch_export"]
    arguments += ["--allow-partial", "--output", str(tmp_path / "x.pt2"), "--classes", "bolt,nut"]
    assert main(["export", *arguments, *map(str, TINY)]) == 2
    assert "--classes names 2 classes, the model has 3 (MODEL.YOLACT" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", PAPERS[:1], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"children": 5}, "was not written by `instseg export`"),
        ({"children": ["../../x"]}, "was not written by `instseg export`"),
        ({"config": 5}, "expected `KEY: value` lines"),
        ({"config": "a: ["}, "not a YAML file"),
        ({"config": "[" * 5000}, "not a YAML file"),
        ({"config": "A: !!python/object/apply:os.mkdir [executed]"}, "never tags that execute"),
    ],
)
def test_a_file_that_carries_something_else_is_refused(
    case: Case,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = onnx.load(case.path)
    model.metadata_props[0].value = json.dumps(json.loads(model.metadata_props[0].value) | changes)
    onnx.save(model, "odd.onnx")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        ExportedPredictor("odd.onnx")
    assert not Path("executed").exists()


@pytest.mark.parametrize("case", PAPERS[:1], indirect=True)
def test_another_size_than_that_of_the_network_is_refused(case: Case) -> None:
    resized = ExportedPredictor(case.path, overrides=["INPUT.SQUARE_SIZE", 80])
    with pytest.raises(CheckpointError, match="overrides change what the network takes, such as"):
        resized(PHOTO)


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.7.1"])
def test_a_torch_that_cannot_write_onnx_is_one_line_that_says_what_to_do(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ConfigError, match=rf"this is {re.escape(version)}; .* torch_export$"):
        export(tiny_predictor("yolact"), "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["2.8.0", "2.11.0+cpu", "3.0.0a0+git1"])
def test_a_newer_torch_is_taken(version: str) -> None:
    exporting._check_torch(version)
