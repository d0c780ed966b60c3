"""``instseg predict`` on videos and cameras: files, exit statuses and messages."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from instseg import cli
from instseg.predict import videos
from tests.predict_common import arguments_for_tiny_model, results
from tests.test_predictor import PHOTO


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for the tiny model, with every object it finds."""
    return arguments_for_tiny_model(tmp_path_factory.mktemp("model"))


def write_video(path: Path, frames: int = 4) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for number in range(frames):
        writer.write(np.roll(PHOTO, number, axis=1))
    writer.release()
    return path


def test_a_video_gives_an_overlay_video_and_results_per_frame(
    model: list[str], tmp_path: Path
) -> None:
    video = write_video(tmp_path / "v.mp4")
    output = tmp_path / "out"
    arguments = [*model, "--input", str(video), "--output", str(output), "--instance-masks"]
    assert cli.main(arguments) == 0
    capture = cv2.VideoCapture(str(output / "v.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    capture.release()
    found = results(output)
    assert [*dict.fromkeys((record["image_id"], record["frame"]) for record in found)] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 3),
    ]
    masks = {path.name[:11] for path in (output / "v_masks").iterdir()}
    assert masks == {f"frame00000{number}" for number in range(4)}


def test_a_camera_is_read_until_it_ends(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = write_video(tmp_path / "v.mp4", frames=2)
    opened = []

    def open_camera(number: int) -> cv2.VideoCapture:
        opened.append(number)
        return capture(str(video))

    capture = cv2.VideoCapture
    monkeypatch.setattr(videos.cv2, "VideoCapture", open_camera)
    assert cli.main([*model, "--input", "0", "--output", str(tmp_path / "out")]) == 0
    assert opened == [0]
    assert (tmp_path / "out" / "camera_0.mp4").stat().st_size > 0
    assert {record["frame"] for record in results(tmp_path / "out")} == {0, 1}


def test_a_bad_video_and_a_missing_camera_are_one_line_each(
    model: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"x" * 1000)
    arguments = [*model, "--output", str(tmp_path / "out")]
    arguments += ["--input", str(tmp_path / "bad.mp4"), "97", str(tmp_path / "none.mp4")]
    assert cli.main(arguments) == 1
    error = capfd.readouterr().err
    assert f"{tmp_path}/bad.mp4: is not a video that OpenCV can decode (1000 bytes)" in error
    assert "camera 97: there is no such camera, or it is in use" in error
    assert f"{tmp_path}/none.mp4: no such file" in error
    assert results(tmp_path / "out") == []
