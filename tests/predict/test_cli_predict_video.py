"""``instseg predict`` on videos and cameras: files, exit statuses, interrupts and resuming."""

import copy
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util

from instseg import Predictor, VideoPredictor, cli
from instseg.data.videos import VideoFile
from instseg.errors import ConfigError
from instseg.predict.results import Results
from instseg.predict.sources import Source
from instseg.predict.videos import VideoRun
from tests.inference.test_predictor import PHOTO, assert_same, tiny_cfg
from tests.support.predict_common import arguments_for_tiny_model, as_lines, results
from tests.support.video_common import VideoStub, images, turned, write_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for the tiny model, with every instance it finds."""
    return arguments_for_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames, ten a second."""
    return write_clip(tmp_path_factory.mktemp("clip") / "v.mp4", images(6))


@pytest.fixture(scope="module")
def uninterrupted(
    model: list[str], clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The file's text, its records and the frames of the overlay."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert cli.main([*model, "--input", str(clip), "--output", str(output)]) == 0
    return {
        "text": (output / "v.json").read_text(),
        "overlay": [frame.image for frame in VideoFile(output / "v.mp4")],
    }


def video_results(output: Path, name: str = "v") -> dict[str, Any]:
    loaded = json.loads((output / f"{name}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def joined(folder: Path) -> Path:
    """Five frames of 64x48, then five of 128x96."""
    small = write_clip(folder / "a.ts", images(5))
    large = write_clip(folder / "b.ts", images(5, 96, 128), [0.5, 0.6, 0.7, 0.8, 0.9])
    path = folder / "joined.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    return path


def test_a_video_gives_an_overlay_video_and_results_per_frame(
    model: list[str], clip: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [*model, "--input", str(clip), "--output", str(output), "--instance-masks"]
    assert cli.main(arguments) == 0
    assert {path.name for path in output.iterdir()} == {"v.json", "v.mp4", "v_masks"}
    assert len(list(VideoFile(output / "v.mp4"))) == 6
    content = video_results(output)
    assert [frame["frame"] for frame in content["frames"]] == list(range(6))
    assert [frame["time"] for frame in content["frames"]] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    masks = {path.name[:11] for path in (output / "v_masks").iterdir()}
    assert masks == {f"frame00000{number}" for number in range(6)}


def test_the_results_of_a_frame_are_those_of_the_predictor(
    model: list[str], clip: Path, uninterrupted: dict[str, Any]
) -> None:
    predictor = Predictor(tiny_cfg(), model[4])
    frames = json.loads(uninterrupted["text"])["frames"]
    for record, frame in zip(frames, VideoFile(clip), strict=True):
        instances = predictor(frame.image)["instances"]
        assert [entry["score"] for entry in record["objects"]] == instances.scores.tolist()
        masks = mask_util.decode([entry["segmentation"] for entry in record["objects"]])
        assert np.array_equal(masks.transpose(2, 0, 1), instances.pred_masks.numpy())


def test_the_file_of_a_video_says_what_it_is_of(
    clip: Path, model: list[str], uninterrupted: dict[str, Any]
) -> None:
    content = json.loads(uninterrupted["text"])
    assert content["info"] == {
        "config": model[2],
        "weights": model[4],
        "overrides": [],
        "confidence": 0.0,
        "rank_by": "class",
        "polygons": False,
        "keyframe_interval": 1,
        "track": False,
    }
    assert content["videos"] == [{"id": 1, "file_name": str(clip), "fps": 10.0, "length": 6}]
    assert [category["name"] for category in content["categories"]] == ["a", "b/c", "d"]
    assert content["complete"] is True


def test_images_and_videos_have_files_of_their_own(
    model: list[str], clip: Path, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), PHOTO)
    arguments = [*model, "--input", str(clip), str(tmp_path / "a.png"), "--no-overlay"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"v.json", "predictions.json", "categories.json"}
    assert {record["image_id"] for record in results(tmp_path / "out")} == {1}


def test_a_video_named_predictions_does_not_replace_the_results_of_images(
    model: list[str], tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), PHOTO)
    write_clip(tmp_path / "predictions.mp4", images(1))
    arguments = [*model, "--no-overlay", "--output", str(tmp_path / "out"), "--input"]
    arguments += [str(tmp_path / "predictions.mp4"), str(tmp_path / "a.png")]
    assert cli.main(arguments) == 0
    assert results(tmp_path / "out")
    assert video_results(tmp_path / "out", "predictions_2")["complete"]


def test_frames_are_upright_in_results_and_overlay(model: list[str], tmp_path: Path) -> None:
    video = turned(write_clip(tmp_path / "v.mp4", images(2)), 90)
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(video), "--output", str(output)]) == 0
    frame = video_results(output)["frames"][0]
    assert (frame["height"], frame["width"]) == (64, 48)
    assert next(iter(VideoFile(output / "v.mp4"))).image.shape == (64, 48, 3)


def test_a_change_of_resolution_is_recorded_and_fitted_into_the_overlay(
    model: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [*model, "--input", str(joined(tmp_path)), "--output", str(output)]
    assert cli.main(arguments) == 0
    frames = video_results(output, "joined")["frames"]
    assert [(f["width"], f["height"]) for f in frames] == [(64, 48)] * 5 + [(128, 96)] * 5
    sizes = {tuple(entry["segmentation"]["size"]) for f in frames[5:] for entry in f["objects"]}
    assert sizes == {(96, 128)}
    overlay = [frame.image.shape for frame in VideoFile(output / "joined.mp4")]
    assert overlay == [(48, 64, 3)] * 10


def test_a_truncated_video_keeps_its_frames_and_is_a_failure(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_clip(tmp_path / "v.mkv", images(20))
    os.truncate(video, video.stat().st_size // 2)
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(video), "--output", str(output)]) == 1
    content = video_results(output)
    assert 0 < len(content["frames"]) < 20
    assert content["complete"] is False
    assert len(list(VideoFile(output / "v.mp4"))) == len(content["frames"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if str(video) in line]
    assert line.startswith(f"{video}: damaged: ")


def test_a_camera_that_stops_is_a_failure_and_its_frames_are_kept(
    model: list[str],
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened = []
    capture = cv2.VideoCapture

    def open_camera(number: int) -> cv2.VideoCapture:
        opened.append(number)
        return capture(str(clip))

    monkeypatch.setattr(cv2, "VideoCapture", open_camera)
    output = tmp_path / "out"
    assert cli.main([*model, "--input", "0", "--output", str(output)]) == 1
    assert opened == [0]
    assert "camera 0: no frame came after the first 6; was it" in capsys.readouterr().err
    assert len(video_results(output, "camera_0")["frames"]) == 6
    assert len(list(VideoFile(output / "camera_0.mp4"))) == 6


def test_a_bad_video_and_a_missing_camera_are_one_line_each(
    model: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"x" * 1000)
    arguments = [*model, "--output", str(tmp_path / "out")]
    arguments += ["--input", str(tmp_path / "bad.mp4"), "97", str(tmp_path / "none.mp4")]
    assert cli.main(arguments) == 1
    error = capfd.readouterr().err
    assert f"{tmp_path}/bad.mp4: is not a video that can be decoded" in error
    assert "camera 97: there is no such camera, or it is in use" in error
    assert f"{tmp_path}/none.mp4: no such file" in error
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which a process in the background of a shell does not have."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_files(
    model: list[str],
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    draw = Results.draw
    drawn = []

    def interrupted(self: Results, *arguments: Any) -> Any:
        drawn.append(True)
        if len(drawn) == 4:
            os.kill(os.getpid(), number)
        return draw(self, *arguments)

    monkeypatch.setattr(Results, "draw", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(clip), "--output", str(output)]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    content = video_results(output)
    assert [frame["frame"] for frame in content["frames"]] == [0, 1, 2, 3]
    assert content["complete"] is False
    assert len(list(VideoFile(output / "v.mp4"))) == 3


@pytest.mark.parametrize("left", [0.0, 0.01, 0.3, 0.5, 0.77, 0.95, 0.999, 1.0])
def test_a_killed_run_resumes_to_what_an_uninterrupted_one_gives(
    model: list[str], clip: Path, uninterrupted: dict[str, Any], tmp_path: Path, left: float
) -> None:
    text = uninterrupted["text"]
    lines = as_lines(text)
    (tmp_path / "v.jsonl").write_text(lines[: int(len(lines) * left)])
    (tmp_path / "v.json").write_text(text.splitlines()[0])  # the lines are newer
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path), "--resume"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "v.json").read_text() == text
    assert not (tmp_path / "v.jsonl").exists()
    overlay = [frame.image for frame in VideoFile(tmp_path / "v.mp4")]
    assert np.array_equal(overlay, uninterrupted["overlay"])


def test_objects_are_restored_from_their_records_as_they_were(tmp_path: Path) -> None:
    predictor = Predictor(tiny_cfg())
    results = Results(predictor, tmp_path, 0.0, overlay=True, instance_masks=False)
    instances = results.keep(predictor(PHOTO)["instances"])
    records = json.loads(json.dumps(results.describe(instances, "v")))
    restored = results.restore(records, 48, 64)
    restored.pred_masks = restored.pred_masks.to_dense()
    assert_same({"instances": restored}, {"instances": instances})
    assert len(results.restore([], 48, 64)) == 0


def test_frames_that_are_kept_are_not_predicted_on_again(
    model: list[str],
    clip: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = as_lines(uninterrupted["text"]).splitlines()
    (tmp_path / "v.jsonl").write_text("\n".join(lines[:5]))
    predicted = []
    keep = Results.keep
    monkeypatch.setattr(
        Results,
        "keep",
        lambda self, instances: (predicted.append(instances), keep(self, instances))[1],
    )
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path), "--resume"]
    assert cli.main([*arguments, "--no-overlay"]) == 0
    assert len(predicted) == 6 - 3  # of four frames the last is done again


def test_an_interrupted_run_resumes_too(
    model: list[str], clip: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    lines = uninterrupted["text"].splitlines()
    rest = [lines[3].rstrip(","), '], "complete": false}', ""]
    (tmp_path / "v.json").write_text("\n".join([*lines[:3], *rest]))
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path), "--resume"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "v.json").read_text() == uninterrupted["text"]


def test_a_complete_video_is_not_done_again(
    model: list[str], clip: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "v.json").write_text(uninterrupted["text"])
    (tmp_path / "v.mp4").write_bytes(b"its overlay")
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path), "--resume"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--no-overlay"]) == 0
    assert (tmp_path / "v.mp4").read_bytes() == b"its overlay"
    assert (tmp_path / "v.json").read_text() == uninterrupted["text"]


def test_without_resume_a_run_starts_over(
    model: list[str], clip: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "v.json").write_text('{"info": {"config": "something else"}}')
    assert cli.main([*model, "--input", str(clip), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "v.json").read_text() == uninterrupted["text"]


def test_a_run_with_other_settings_is_not_resumed(
    model: list[str],
    clip: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "v.json").write_text(uninterrupted["text"])
    arguments = [*model, "--confidence", "0.25", "--input", str(clip), "--resume"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 2
    message = "v.json was written with confidence 0.0, not 0.25; it cannot be resumed"
    assert message in capsys.readouterr().err
    assert (tmp_path / "v.json").read_text() == uninterrupted["text"]


def test_another_video_of_the_same_name_is_not_resumed(
    model: list[str],
    uninterrupted: dict[str, Any],
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "v.json").write_text(uninterrupted["text"][:-100])
    monkeypatch.setattr("instseg.predict.videos.VideoFile", lambda name: VideoFile(large))
    large = write_clip(tmp_path / "large.mp4", images(6, 96, 128))
    arguments = [*model, "--input", str(clip), "--resume", "--output", str(tmp_path)]
    assert cli.main(arguments) == 2
    message = f"frame 0 of {clip} is not of 64x48 pixels as in the run to be resumed"
    assert message in capsys.readouterr().err
    assert video_results(tmp_path)["frames"] == json.loads(uninterrupted["text"])["frames"][:4]


def test_a_camera_is_not_resumed(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*model, "--input", "0", "--output", str(tmp_path), "--resume"]
    assert cli.main(arguments) == 2
    assert (
        "error: --resume: camera 0 cannot show its earlier frames again" in capsys.readouterr().err
    )


def test_a_key_frame_interval_for_a_model_without_shared_work_is_a_mistake(
    model: list[str], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path)]
    assert cli.main([*arguments, "--keyframe-interval", "5"]) == 2
    assert "sees every frame alone" in capsys.readouterr().err


class Runs:
    """Runs of the stub video model, with key frames 0, 3, 6, ..."""

    def __init__(self, predictor: Predictor, output: Path) -> None:
        self._predictor = copy.copy(predictor)
        self._output = output

    def run(self, source: Path, **options: Any) -> tuple[str, str]:
        """Text of the records, and the network's calls."""
        self._predictor.model = VideoStub().eval()
        results = Results(self._predictor, self._output, 0.0, overlay=True, instance_masks=False)
        run = VideoRun(results, VideoPredictor(self._predictor), {"config": ""}, **options)
        run.predict(Source(str(source), "v", "video"))
        run.predict(Source(str(source), "again", "video"))
        assert results.failures == 0
        return (self._output / "v.json").read_text(), self._predictor.model.calls


@pytest.fixture(scope="module")
def tiny() -> Predictor:
    return Predictor(tiny_cfg())


def test_every_video_begins_with_a_key_frame(tiny: Predictor, clip: Path, tmp_path: Path) -> None:
    text, calls = Runs(tiny, tmp_path).run(clip, resume=False)
    assert calls == "KBBKBB" * 2
    keyframes = [frame["keyframe"] for frame in json.loads(text)["frames"]]
    assert keyframes == [True, False, False] * 2


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_a_resumed_video_model_starts_from_its_last_key_frame(
    tiny: Predictor, clip: Path, tmp_path: Path, frames: int
) -> None:
    runs = Runs(tiny, tmp_path)
    text, _ = runs.run(clip, resume=False)
    lines = as_lines(text).splitlines()
    (tmp_path / "v.jsonl").write_text("\n".join(lines[: frames + 1]))
    resumed, calls = runs.run(clip, resume=True)
    assert resumed == text
    assert calls == ("KBBKBB" if frames < 4 else "KBB")


def test_a_foreign_file_is_not_resumed(tiny: Predictor, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text('{"videos": [], "frames": [\n')
    with pytest.raises(ConfigError, match="cannot be resumed"):
        Runs(tiny, tmp_path).run(clip, resume=True)
