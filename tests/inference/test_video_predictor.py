"""VideoPredictor: the choice of key frames, and frames that cannot be used."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from instseg import Predictor, VideoPredictor
from instseg.errors import ConfigError, ImageError
from tests.inference.test_predictor import PHOTO, assert_same, tiny_cfg
from tests.support.video_common import VideoStub, images


@pytest.fixture(scope="module")
def alone() -> Predictor:
    """A predictor whose model sees every frame alone."""
    torch.manual_seed(0)
    return Predictor(tiny_cfg())


@pytest.fixture
def video(alone: Predictor) -> VideoPredictor:
    """The stub model, with key frames as it wants them."""
    return VideoPredictor(with_stub(alone))


def with_stub(predictor: Predictor) -> Predictor:
    changed = copy.copy(predictor)
    changed.model = VideoStub().eval()
    return changed


def calls(video: VideoPredictor) -> str:
    made = video.predictor.model.calls
    assert isinstance(made, str)
    return made


def test_key_frames_come_at_the_interval_of_the_model(video: VideoPredictor) -> None:
    results = [video(frame) for frame in images(7)]
    assert calls(video) == "KBBKBBK"
    assert [result["keyframe"] for result in results] == [letter == "K" for letter in "KBBKBBK"]


@pytest.mark.parametrize(("interval", "expected"), [(1, "KKKKK"), (2, "KBKBK"), (9, "KBBBB")])
def test_the_interval_can_be_chosen(alone: Predictor, interval: int, expected: str) -> None:
    video = VideoPredictor(with_stub(alone), keyframe_interval=interval)
    assert len(list(video.stream(images(5)))) == 5
    assert calls(video) == expected


def test_frames_between_see_the_last_key_frame(video: VideoPredictor) -> None:
    greys = [30, 60, 90, 120, 150]
    frames = [np.full((48, 64, 3), grey, np.uint8) for grey in greys]
    # Key frames 0 and 3; between: (own + 2 * key) / 3.
    expected = [30, (60 + 2 * 30) / 3, (90 + 2 * 30) / 3, 120, (150 + 2 * 120) / 3]
    values = [float(video(frame)["instances"].scores[0]) * 255 for frame in frames]
    assert values == pytest.approx(expected, abs=1e-3)


def test_after_a_reset_comes_a_key_frame(video: VideoPredictor) -> None:
    video(PHOTO)
    video.reset()
    assert video(PHOTO)["keyframe"]


def test_another_size_makes_a_key_frame_and_is_said(
    video: VideoPredictor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "instseg"):
        for frame in [*images(2), *images(2, 96, 128)]:
            video(frame)
    assert calls(video) == "KBKB"
    assert [record.getMessage() for record in caplog.records] == [
        "frame is a key frame: it has 128x96 pixels and those before it 64x48"
    ]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.full((48, 64, 3), np.nan, np.float32), ImageError),
        (np.zeros((0, 64, 3), np.uint8), ImageError),
        (None, ImageError),
        (np.zeros((48, 64, 3), np.uint16), ImageError),
        (torch.zeros(3, 48, 64), TypeError),
        ([PHOTO], TypeError),
    ],
)
def test_a_frame_that_is_refused_counts_for_nothing(
    alone: Predictor, video: VideoPredictor, bad: object, error: type[Exception]
) -> None:
    frames = images(3)
    expected = list(VideoPredictor(with_stub(alone)).stream(frames))
    results = [video(frames[0])]
    with pytest.raises(error):
        video(bad)
    results += [video(frames[1]), video(frames[2])]
    for one, other in zip(results, expected, strict=True):
        assert one["keyframe"] == other["keyframe"]
        assert_same(one, other)


def test_a_failing_network_leaves_the_state(
    video: VideoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raise RuntimeError("out of memory")

    video(PHOTO)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(video.predictor.model, "between", fail)
        video(PHOTO)
    assert [video(PHOTO)["keyframe"] for _ in range(3)] == [False, False, True]


def test_a_frame_too_thin_for_the_network_has_no_instances(video: VideoPredictor) -> None:
    video(PHOTO)
    assert len(video(np.zeros((1, 4000, 3), np.uint8))["instances"]) == 0
    assert not video(PHOTO)["keyframe"]


def test_no_gradient_is_kept_from_frame_to_frame(video: VideoPredictor) -> None:
    video(PHOTO)
    assert not video(PHOTO)["instances"].scores.requires_grad


def test_a_model_without_shared_work_sees_every_frame_alone(alone: Predictor) -> None:
    frames = images(4)
    video = VideoPredictor(alone)
    for frame, result in zip(frames, video.stream(frames), strict=True):
        assert result["keyframe"]
        assert_same(result, alone(frame))
        assert_same(result, video(frame))


def test_it_is_made_from_a_configuration() -> None:
    assert len(VideoPredictor(tiny_cfg(), keyframe_interval=1)(PHOTO)["instances"]) > 0


def test_an_interval_below_one_is_refused(alone: Predictor) -> None:
    with pytest.raises(ConfigError, match="key frame interval is 0, expected at least 1"):
        VideoPredictor(with_stub(alone), keyframe_interval=0)


def test_an_interval_for_a_model_without_shared_work_is_refused(alone: Predictor) -> None:
    with pytest.raises(ConfigError, match="GeneralizedRCNN sees every frame alone"):
        VideoPredictor(alone, keyframe_interval=5)


def test_a_predictor_brings_its_own_weights(alone: Predictor) -> None:
    with pytest.raises(ConfigError, match="has its weights"):
        VideoPredictor(alone, "model.pth")
