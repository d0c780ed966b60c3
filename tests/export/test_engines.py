"""ExportedPredictor(engine=...): the same file in onnxruntime and OpenVINO."""

import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instseg import VideoPredictor, optional
from instseg.errors import CheckpointError, ConfigError
from instseg.export import ExportedPredictor, engines, to_int8
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


both_engines = pytest.mark.parametrize(
    "engine", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]
)


def save(path: Path, nodes: list[Any], initializers: list[Any], side: int = 8) -> Path:
    """Write a network from images of four channels to as many of ``side`` pixels."""
    images, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, side, side])
        for name in ("images", "y")
    )
    graph = onnx.helper.make_graph(nodes, "g", [images], [y], initializers)
    opset = onnx.helper.make_opsetid("", 19)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def convolution(path: Path, side: int = 8) -> Path:
    """Write a network of one convolution that keeps values."""
    ones = np.eye(4).ravel().tolist()
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4, 1, 1], ones)
    return save(path, [onnx.helper.make_node("Conv", ["images", "w"], ["y"])], [weight], side)


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
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4, 1, 1], [0.0] * 16)
    offset = onnx.helper.make_tensor("o", onnx.TensorProto.FLOAT, [1, 2, 8, 8], [0.0] * 128)
    nodes = [
        onnx.helper.make_node("DeformConv", ["images", "w", "o"], ["z"]),
        onnx.helper.make_node("Conv", ["z", "w"], ["y"]),
    ]
    save(tmp_path / "plus.onnx", nodes, [weight, offset])
    with pytest.raises(CheckpointError, match=r"OpenVINO reads no DeformConv: use engine='onnx"):
        ExportedPredictor(tmp_path / "plus.onnx", engine="openvino")


@both_engines
def test_another_fault_of_a_file_is_not_put_down_to_deformable_convolutions(
    engine: str, tmp_path: Path
) -> None:
    (tmp_path / "a.onnx").write_bytes(b"DeformConv")
    with pytest.raises(CheckpointError, match=r"a\.onnx cannot be run: "):
        ExportedPredictor(tmp_path / "a.onnx", engine=engine)


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
        assert torch.equal(ours, theirs) == (other.engine_dtype == "float32")
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


def test_threads_reach_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    counts = []
    session = onnxruntime.InferenceSession

    def noted(path: str, options: Any, **words: Any) -> Any:
        counts.append(options.intra_op_num_threads)
        return session(path, options, **words)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    for threads in (1, 2, None):
        Engine(threads=threads).load(convolution(tmp_path / "a.onnx"))
    assert counts == [1, 2, 0]  # 0 is onnxruntime's own number


@needs_openvino
def test_threads_and_the_number_type_reach_openvino(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    noted = []

    class Core(openvino.Core):
        def compile_model(self, model: Any, device: str, properties: Any) -> Any:
            noted.append(properties)
            return super().compile_model(model, device, properties)

    monkeypatch.setattr(openvino, "Core", Core)
    path = convolution(tmp_path / "a.onnx")
    Engine("openvino", threads=2).load(path)
    Engine("openvino", dtype="bfloat16").load(path)
    assert noted == [
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "2"},
        {"INFERENCE_PRECISION_HINT": "bf16"},
    ]


@pytest.mark.parametrize(("able", "expected"), [(False, "float32"), (True, "bfloat16")])
def test_an_engine_in_another_number_type_is_told_once(
    able: bool,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = engines.Opened(lambda inputs: [], {}, "", "bfloat16" if able else "float32")
    monkeypatch.setitem(engines.ENGINES, "openvino", lambda path, engine: opened)
    monkeypatch.setattr(optional, "find_spec", lambda name: True)
    engines._warn_of_float32.cache_clear()
    (tmp_path / "a.onnx").touch()
    with caplog.at_level(logging.WARNING, logger="instseg"):
        for _ in range(2):
            network, _ = Engine("openvino", dtype="bfloat16").load(tmp_path / "a.onnx")
    engines._warn_of_float32.cache_clear()
    assert network.dtype == expected
    assert caplog.text.count("OpenVINO computes in float32 (said once)") == (not able)


@both_engines
def test_threads_of_python_may_share_a_network(engine: str, tmp_path: Path) -> None:
    network, _ = Engine(engine, threads=1).load(convolution(tmp_path / "a.onnx", side=300))

    def wrong_results(value: float) -> int:
        images = torch.full((1, 4, 300, 300), value)
        return sum(not torch.equal(network(images)[0], images) for _ in range(25))

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(wrong_results, (1.0, 2.0))) == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "engine is 'tensorrt'; expected one of onnxruntime, openvino"),
        ({"engine": ["openvino"]}, r"engine is \['openvino'\]; expected one of onnxruntime, open"),
        ({"threads": 0}, "threads is 0; expected 1 to 1024, or None"),
        ({"threads": 2**31}, "threads is 2147483648; expected 1 to 1024"),
        ({"threads": True}, "threads is True; expected 1 to 1024"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\]; expected float32 or bfloat16"),
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
