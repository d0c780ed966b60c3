"""Exported networks computed in 8 bits give nearly the instances of the model, or say why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image

from instseg import VideoPredictor
from instseg.cli import main
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError
from instseg.export import ExportedPredictor, calibration_images, export, to_int8
from instseg.export.int8 import LEAST_IMAGES, _compared
from instseg.inference.predictor import Predictor
from instseg.masks import CroppedMasks
from tests.export.test_export import PAPERS
from tests.support.exported import Case, VideoCase
from tests.support.yolact_tiny import CONFIGS, tiny_cfg

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
pytest.importorskip("onnxruntime.quantization")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    made = (shapes.image("shapes_train", index, 96) for index in range(LEAST_IMAGES + 2))
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in made]


def copied(files: list[Path], folder: Path) -> Path:
    for file in files:
        shutil.copy(file, folder)
    return folder / files[0].name


def quantized_operators(path: Path) -> set[str]:
    """The operators whose inputs have been rounded to 8 bits."""
    graph = onnx.load(path).graph
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {node.op_type for node in graph.node if rounded.intersection(node.input)}


def instances(scores: list[float], rows: list[int]) -> Instances:
    """Masks of single rows of an image of 4 x 4 pixels."""
    masks = torch.zeros(len(rows), 4, 4, dtype=torch.bool)
    masks[range(len(rows)), rows] = True
    return Instances(
        (4, 4),
        scores=torch.tensor(scores),
        pred_classes=torch.zeros(len(rows), dtype=torch.int64),
        pred_masks=CroppedMasks.from_dense(masks),
    )


def test_an_instance_is_kept_if_its_mask_and_a_high_score_are() -> None:
    expected = [instances([0.9, 0.8, 0.1], [0, 1, 2])]
    # The first instance has no counterpart, and takes none from the second.
    assert _compared(expected, [instances([0.7], [1])], 10, 0.5).kept == 0.5
    assert _compared(expected, expected, 10, 0.5).kept == 1
    assert _compared(expected, [instances([0.02, 0.02], [0, 1])], 10, 0.5).kept == 0


@pytest.mark.parametrize("paper", PAPERS)
def test_a_network_in_8_bits_gives_nearly_what_the_model_does(
    paper: str, exported_as: Callable[[str], Case], images: list[np.ndarray], tmp_path: Path
) -> None:
    case = exported_as(paper)
    path = copied(case.files, tmp_path)
    report = to_int8(path, case.predictor, images, confidence=0.0)
    assert (report.calibrated, report.measured) == (10, 2)
    # An untrained network gives many instances with nearly the same score.
    assert report.detections > 20 and report.kept > 0.1
    assert "Conv" in quantized_operators(path)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["instseg"])["int8"]["kept"] == report.kept
    exported = ExportedPredictor(path)
    assert exported.categories == case.predictor.categories
    model = case.predictor.model
    inputs = model.preprocess([case.predictor.model_input(images[0])])
    with torch.no_grad():
        for ours, theirs in zip(exported._loaded(inputs), model.raw(inputs), strict=True):
            difference = (ours - theirs).abs().mean() / theirs.std()
            assert 1e-4 < difference < 0.3


def test_both_networks_of_a_video_are_calibrated(
    exported_video: VideoCase, images: list[np.ndarray], tmp_path: Path
) -> None:
    path = copied(exported_video.files, tmp_path)
    report = to_int8(path, exported_video.predictor, images, confidence=0.0)
    assert report.measured == 2 and report.detections
    for file in (path, tmp_path / "edge.between.onnx"):
        assert "Conv" in quantized_operators(file)
    frames = VideoPredictor(ExportedPredictor(path))
    assert [frames(x)["keyframe"] for x in images[:2]] == [True, False]


def test_parts_of_the_network_stay_in_float32_on_request(
    exported_as: Callable[[str], Case], images: list[np.ndarray], tmp_path: Path
) -> None:
    case = exported_as("yolact")
    path = copied(case.files, tmp_path)
    names = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    parts = {name.partition("/")[0].partition(".")[0] for name in names}
    to_int8(path, case.predictor, images, sorted(parts), confidence=0.0)
    assert "Conv" not in quantized_operators(path)
    path = copied(case.files, tmp_path)
    with pytest.raises(ConfigError, match="--keep-float hed: no part .* its parts begin with"):
        to_int8(path, case.predictor, images, ["hed"], confidence=0.0)
    assert path.read_bytes() == case.path.read_bytes(), "a refusal changes nothing"


def test_a_network_that_finds_nothing_cannot_be_measured(
    exported_as: Callable[[str], Case], images: list[np.ndarray], tmp_path: Path
) -> None:
    case = exported_as("yolact")
    path = copied(case.files, tmp_path)
    with pytest.raises(ConfigError, match="finds no instance with a score of 1.5 in 2 images"):
        to_int8(path, case.predictor, images, confidence=1.5)
    assert path.read_bytes() == case.path.read_bytes()


def written(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    common = ["export", "--config-file", CONFIGS["yolact"], "--allow-partial"]
    common += ["--output", "model.onnx", *arguments]
    assert main(common) == 2
    return capsys.readouterr().err


def test_options_that_do_not_go_together_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    onnx_file = ["--format", "onnx"]
    message = refusal([*onnx_file, "--int8"], capsys)
    assert "--int8 needs --calibrate: a folder of images" in message
    message = refusal([*onnx_file, "--calibrate", "x"], capsys)
    assert "--calibrate and --keep-float go with --int8" in message
    message = refusal(["--format", "torch_export", "--int8", "--calibrate", "x"], capsys)
    assert "--int8 goes with --format onnx, not with torch_export" in message
    message = refusal(
        [*onnx_file, "--int8", "--calibrate", "x", "--calibration-images", "0"], capsys
    )
    assert "--calibration-images is 0; expected at least 1" in message


def test_images_that_ranges_cannot_be_had_from_are_refused(
    images: list[np.ndarray], tmp_path: Path
) -> None:
    predictor = Predictor(tiny_cfg("yolact"))
    few = written(tmp_path / "few", images[: LEAST_IMAGES - 1])
    with pytest.raises(ConfigError, match="--calibrate gives 9 images; expected at least 10"):
        calibration_images(sorted(few.iterdir()), predictor)
    black = written(tmp_path / "black", [*images[:LEAST_IMAGES], images[0] * 0])
    with pytest.raises(ConfigError, match="010.png: every pixel has the value 0; calibrate on"):
        calibration_images(sorted(black.iterdir()), predictor)


def test_the_command_reads_the_images_of_a_folder_evenly(
    images: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = written(tmp_path / "in", [*images, *images[:8]])
    given: list[Any] = []
    monkeypatch.setattr("instseg.export.export", lambda *_: [Path("model.onnx")])
    monkeypatch.setattr("instseg.export.to_int8", lambda *x: given.append(x) or "kept all")
    (tmp_path / "config.yaml").write_text(tiny_cfg("yolact").dump())
    arguments = ["export", "--config-file", str(tmp_path / "config.yaml"), "--allow-partial"]
    arguments += ["--format", "onnx", "--output", str(tmp_path / "model.onnx"), "--int8"]
    arguments += ["--calibrate", str(folder), "--calibration-images", "10", "--keep-float", "head"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == ["model.onnx", "kept all"]
    ((_, predictor, arrays, keep_float),) = given
    assert keep_float == ["head"] and len(arrays) == 10
    assert np.array_equal(arrays[1], images[2][:, :, ::-1])
    assert not any(isinstance(x, torch.nn.BatchNorm2d) for x in predictor.model.modules())


def test_a_network_in_bfloat16_is_not_exported(tmp_path: Path) -> None:
    predictor = Predictor(tiny_cfg("yolact"), dtype="bfloat16")
    with pytest.raises(ConfigError, match="a network in bfloat16 cannot be exported"):
        export(predictor, "onnx", tmp_path / "model.onnx")
