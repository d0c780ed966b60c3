"""A model for videos is exported as two networks, its state passed between them outside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instseg.errors import CheckpointError
from instseg.export import ExportedPredictor
from instseg.inference.video import VideoPredictor
from instseg.modeling import VideoModel
from tests.support.exported import Case, VideoCase
from tests.support.yolact_common import image
from tests.support.yolact_tiny import PHOTO, same_detections

pytest.importorskip("onnxscript", reason="needs the extra 'export'")
onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="needs the extra 'export'")


def frame(seed: int) -> dict[str, Any]:
    return image(48, 64, seed)


@pytest.fixture(scope="module")
def case(exported_video: VideoCase) -> VideoCase:
    return exported_video


@pytest.fixture(scope="module")
def video(case: VideoCase) -> VideoModel:
    video = ExportedPredictor(case.path).video()
    assert video is not None
    return video


def test_there_is_a_file_for_key_frames_and_one_for_frames_between(case: VideoCase) -> None:
    assert [path.name for path in case.files] == ["edge.onnx", "edge.between.onnx"]
    state = ["state0", "state1", "state2"]
    key, between = (onnx.load(path) for path in case.files)
    for model in (key, between):
        onnx.checker.check_model(model, full_check=True)
        assert {x.domain for x in model.graph.node} == {""}
    assert [x.name for x in key.graph.input] == ["images"]
    assert [x.name for x in key.graph.output] == [*case.model.raw_names, *state]
    assert [x.name for x in between.graph.input] == ["images", *state]
    assert [x.name for x in between.graph.output] == list(case.model.raw_names)


def test_layers_are_called_after_their_part_of_the_model(case: VideoCase) -> None:
    """So that a part can be given a precision of its own."""
    between = onnx.load(case.files[1])
    convolutions = [x.name for x in between.graph.node if x.op_type == "Conv"]
    parts = {name.removeprefix("model.").partition(".")[0] for name in convolutions}
    assert parts == {"backbone", "fpn", "protonet", "head", "flow_net", "refinement"}
    assert len({x.name for x in between.graph.node}) == len(between.graph.node)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_frames_in_onnxruntime_equal_those_of_the_model(
    case: VideoCase, video: VideoModel, batch: int
) -> None:
    frames = [case.model.preprocess([frame(10 * t + i) for i in range(batch)]) for t in range(3)]
    outputs, state = video.keyframe(frames[0])
    expected, own_state = case.model.keyframe(frames[0])
    for one, other in zip((*outputs, *state), (*expected, *own_state), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for images in frames[1:]:
        theirs = case.model.between(images, own_state)
        for one, other in zip(video.between(images, state), theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_results_of_frames_in_onnxruntime_are_those_of_the_model(
    case: VideoCase, video: VideoModel
) -> None:
    inputs = [[frame(0)], [frame(1)]]
    results = []
    for model in (video, case.model):
        _, state = model.keyframe(model.preprocess(inputs[0]))
        outputs = model.between(model.preprocess(inputs[1]), state)
        results.append(model.postprocess(outputs, inputs[1])[0])
    assert len(results[0]["instances"]) > 0
    same_detections(*results)


def test_frames_are_predicted_in_their_order_by_the_files(case: VideoCase) -> None:
    """The model beside the files has random weights, which must not be asked."""
    exported = ExportedPredictor(case.path)
    case.model.detection_settings = exported.model.detection_settings
    ours, theirs = VideoPredictor(case.predictor), VideoPredictor(exported)
    for number in range(5):
        image = np.roll(PHOTO, 5 * number, axis=1)
        result, expected = theirs(image), ours(image)
        assert result["keyframe"] is expected["keyframe"] is (number in (0, 3))
        same_detections(result, expected)


def test_the_interval_of_key_frames_is_that_of_the_configuration(video: VideoModel) -> None:
    assert isinstance(video, VideoModel) and video.keyframe_interval == 3


def test_single_images_are_predicted_by_the_first_file(case: VideoCase, tmp_path: Path) -> None:
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(case.path.read_bytes())
    exported = ExportedPredictor(alone)
    case.model.detection_settings = exported.model.detection_settings
    same_detections(exported(PHOTO), case.predictor(PHOTO))
    with pytest.raises(CheckpointError, match=r"alone\.between\.onnx: no such file"):
        exported.video()


def test_a_network_for_single_images_has_no_video(exported_as: Callable[[str], Case]) -> None:
    assert ExportedPredictor(exported_as("yolact").path).video() is None
