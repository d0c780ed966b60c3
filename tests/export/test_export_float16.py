"""Exported files that a tool has converted to half precision are predicted with as they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from instseg import VideoPredictor
from instseg.errors import CheckpointError
from instseg.export import ExportedPredictor
from tests.export.test_export import PAPERS
from tests.support.exported import Case, VideoCase
from tests.support.yolact_tiny import PHOTO

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
float16 = pytest.importorskip("onnxruntime.transformers.float16")


@pytest.fixture(scope="module", params=PAPERS)
def case(request: pytest.FixtureRequest, exported_as: Callable[[str], Case]) -> Case:
    return exported_as(request.param)


def converted(path: Path, folder: Path) -> Path:
    """A file as a user's tool makes it of ``path``."""
    model = float16.convert_float_to_float16(onnx.load(path))
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    onnx.save(model, folder / path.name)
    return folder / path.name


@pytest.mark.parametrize("parts", ["all files", "the network", "the others"])
def test_a_file_with_float16_inputs_gives_nearly_what_the_model_does(
    case: Case, parts: str, tmp_path: Path
) -> None:
    for number, path in enumerate(case.files):
        if parts == "all files" or (parts == "the network") == (number == 0):
            converted(path, tmp_path)
        else:
            shutil.copy(path, tmp_path)
    exported = ExportedPredictor(tmp_path / case.path.name)
    model = case.predictor.model
    images = model.preprocess([{"image": torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)}])
    with torch.no_grad():
        for ours, theirs in zip(exported._loaded(images), model.raw(images), strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).abs().mean() < 0.05 * theirs.std()
    instances = exported(PHOTO)["instances"]
    assert len(instances) == 50


@pytest.mark.parametrize("number", [0, 1, None], ids=["key frames", "frames between", "both"])
def test_frames_run_where_either_file_has_float16_inputs(
    exported_video: VideoCase, number: int | None, tmp_path: Path
) -> None:
    for index, path in enumerate(exported_video.files):
        if number in (index, None):
            converted(path, tmp_path)
        else:
            shutil.copy(path, tmp_path)
    frames = VideoPredictor(ExportedPredictor(tmp_path / exported_video.path.name))
    results = [frames(PHOTO), frames(PHOTO)]
    assert [result["keyframe"] for result in results] == [True, False]
    assert all(len(result["instances"]) == 50 for result in results)


def test_a_file_whose_inputs_are_no_numbers_of_ours_is_refused(tmp_path: Path) -> None:
    images, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, ["b"])
        for name in ("images", "y")
    )
    node = onnx.helper.make_node("Identity", ["images"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [images], [y])
    opset = onnx.helper.make_opsetid("", 19)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "q.onnx"
    )
    with pytest.raises(CheckpointError, match=r"cannot be run: its input images is tensor\(int8\)"):
        ExportedPredictor(tmp_path / "q.onnx")
