"""ExportedPredictor(engine=...): the same file in onnxruntime and OpenVINO."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instseg import VideoPredictor, optional
from instseg.errors import CheckpointError, ConfigError
from instseg.export import ExportedPredictor, to_int8
from instseg.export.engines import Engine
from instseg.export.exporting import export
from tests.export.test_export import with_settings
from tests.support.exported import Case, VideoCase
from tests.support.yolact_tiny import PHOTO, same_detections, tiny_predictor

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="needs OpenVINO (pip install 'instseg[openvino]')",
)


@needs_openvino
def test_openvino_gives_the_detections_of_the_model(exported_as: Callable[[str], Case]) -> None:
    case = exported_as("yolact")
    exported = ExportedPredictor(case.path, engine="openvino", threads=1)
    with_settings(case.predictor, exported)
    same_detections(exported(PHOTO), case.predictor(PHOTO))
    exported.batch_size = 2
    for result, image in zip(exported([PHOTO, PHOTO[::-1]]), (PHOTO, PHOTO[::-1]), strict=True):
        same_detections(result, case.predictor(image))


@needs_openvino
def test_a_deformable_convolution_is_refused_by_openvino(tmp_path: Path) -> None:
    images, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 4, 8, 8])
        for name in ("images", "y")
    )
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4, 1, 1], [0.0] * 16)
    offset = onnx.helper.make_tensor("o", onnx.TensorProto.FLOAT, [1, 2, 8, 8], [0.0] * 128)
    nodes = [
        onnx.helper.make_node("DeformConv", ["images", "w", "o"], ["z"]),
        onnx.helper.make_node("Conv", ["z", "w"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [images], [y], [weight, offset])
    opset = onnx.helper.make_opsetid("", 19)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.save(model, tmp_path / "plus.onnx")
    with pytest.raises(CheckpointError, match=r"OpenVINO reads no DeformConv: use engine='onnx"):
        ExportedPredictor(tmp_path / "plus.onnx", engine="openvino")


@needs_openvino
def test_openvino_gives_both_kinds_of_frames(exported_video: VideoCase) -> None:
    frames = VideoPredictor(ExportedPredictor(exported_video.path, engine="openvino"))
    others = VideoPredictor(ExportedPredictor(exported_video.path))
    for image in (PHOTO, PHOTO[::-1]):
        result = frames(image)
        same_detections(result, expected := others(image))
        assert result["keyframe"] == expected["keyframe"]


@needs_openvino
def test_openvino_in_bfloat16_gives_nearly_what_float32_does(
    exported_as: Callable[[str], Case],
) -> None:
    case = exported_as("yolact")
    one, other = (
        ExportedPredictor(case.path, engine="openvino", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    images = case.predictor.model.preprocess([one.model_input(PHOTO)])
    for ours, theirs in zip(one._loaded(images), other._loaded(images), strict=True):
        assert theirs.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.05 * ours.std()


@needs_openvino
def test_a_file_in_8_bits_runs_in_openvino_as_in_onnxruntime(tmp_path: Path) -> None:
    predictor = tiny_predictor("yolact", "MODEL.YOLACT.SCORE_THRESH_TEST", 0.0)
    path = tmp_path / "model.onnx"
    export(predictor, "onnx", path)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, PHOTO.shape, dtype=np.uint8) for _ in range(10)]
    to_int8(path, predictor, images, confidence=0.0)
    one, other = (ExportedPredictor(path, engine=x) for x in ("onnxruntime", "openvino"))
    batch = predictor.model.preprocess([one.model_input(PHOTO)])
    for ours, theirs in zip(one._loaded(batch), other._loaded(batch), strict=True):
        assert (ours - theirs).abs().mean() < 0.05 * ours.std()


@needs_openvino
def test_a_damaged_file_is_refused_by_openvino_too(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"a\.onnx cannot be run: "):
        ExportedPredictor(tmp_path / "a.onnx", engine="openvino")


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_threads_can_be_set(engine: str, exported_as: Callable[[str], Case]) -> None:
    """The result is that of any other number of threads."""
    case = exported_as("yolact")
    one = ExportedPredictor(case.path, engine=engine, threads=1)(PHOTO)
    same_detections(ExportedPredictor(case.path, engine=engine, threads=2)(PHOTO), one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "engine is 'tensorrt'; expected one of onnxruntime, openvino"),
        ({"threads": 0}, "threads is 0; expected at least 1, or None"),
        ({"threads": True}, "threads is True; expected at least 1"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
        ({"dtype": "bfloat16"}, "onnxruntime does not compute; expected float32, or engine="),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportedPredictor("model.onnx", **options)


def test_a_missing_openvino_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    message = r"engine='openvino' needs the package openvino, .*pip install 'instseg\[openvino\]'"
    with pytest.raises(ConfigError, match=message):
        Engine("openvino")
