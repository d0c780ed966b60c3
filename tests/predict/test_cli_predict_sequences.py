"""``instseg predict`` on folders with ``--track``, numbered images, streams and trees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instseg import cli
from instseg.data.videos import VideoFile
from tests.data.test_streams import served
from tests.support.predict_common import arguments_for_tiny_model, as_lines, assert_refused, results
from tests.support.video_common import images, write_clip

pytest.importorskip("trackers", reason="needs the extra 'video'")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return arguments_for_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three frames of a walk, 48 x 64 pixels."""
    folder = tmp_path_factory.mktemp("in") / "walk"
    folder.mkdir()
    for number, image in enumerate(images(3), 9):
        Image.fromarray(image[:, :, ::-1]).save(folder / f"f_{number}.png")
    return folder


def content_of(output: Path, name: str) -> dict[str, Any]:
    loaded = json.loads((output / f"{name}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_a_folder_with_track_is_a_video_of_its_images(
    model: list[str], walk: Path, tmp_path: Path
) -> None:
    arguments = [*model, "--input", str(walk), "--track", "--fps", "5", "--tracker", "bytetrack"]
    arguments += ["--track-patience", "3", "--track-min-iou", "0.2", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"walk.json", "walk.mp4"}
    content = content_of(tmp_path, "walk")
    assert content["videos"] == [{"id": 1, "file_name": str(walk), "fps": 5.0, "length": 3}]
    settings = {"track": True, "tracker": "bytetrack", "track_patience": 3, "track_min_iou": 0.2}
    assert settings.items() <= content["info"].items()
    names = [frame["file_name"] for frame in content["frames"]]
    assert names == ["f_9.png", "f_10.png", "f_11.png"]
    assert [frame["time"] for frame in content["frames"]] == [0, 0.2, 0.4]
    assert all("track_id" in entry for frame in content["frames"] for entry in frame["objects"])
    assert len(list(VideoFile(tmp_path / "walk.mp4"))) == 3


def test_a_sequence_is_resumed_to_what_an_uninterrupted_run_gives(
    model: list[str], walk: Path, tmp_path: Path
) -> None:
    arguments = [*model, "--input", str(walk / "f_%d.png"), "--output", str(tmp_path), "--track"]
    assert cli.main(arguments) == 0
    text = (tmp_path / "f.json").read_text()
    (tmp_path / "f.jsonl").write_text("\n".join(as_lines(text).splitlines()[:3]))
    assert cli.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "f.json").read_text() == text


def test_tracks_are_drawn(model: list[str], walk: Path, tmp_path: Path) -> None:
    overlays = []
    for name, track in (("plain", []), ("tracked", ["--track"])):
        arguments = [*model, "--input", str(walk / "f_%d.png"), "--output", str(tmp_path / name)]
        assert cli.main([*arguments, *track]) == 0
        overlays.append([frame.image for frame in VideoFile(tmp_path / name / "f.mp4")])
    plain, tracked = overlays
    assert not np.array_equal(plain, tracked)


def test_a_stream_gives_results_that_hold_no_password(
    model: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site, output = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    write_clip(site / "v.mp4", images(4), options={"movflags": "faststart"})
    with served(site) as address:
        urls = [f"{address}/v.mp4?token=secret", f"{address}/none.mp4?token=secret"]
        assert cli.main([*model, "--output", str(output), "--input", *urls]) == 1
    shown = f"http://{address.rpartition('@')[2]}"
    content = content_of(output, "v")
    assert content["videos"][0]["file_name"] == f"{shown}/v.mp4"
    assert (len(content["frames"]), content["complete"]) == (4, True)
    errors = capfd.readouterr().err
    assert f"{shown}/none.mp4: cannot be read: " in errors
    assert "secret" not in errors
    assert not any(b"secret" in path.read_bytes() for path in output.iterdir())


def test_images_of_one_name_in_a_tree_have_results_of_their_own(
    model: list[str], walk: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    for folder in ("a", "b"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "x.png").write_bytes((walk / "f_9.png").read_bytes())
    arguments = [*model, "--input", str(tree), "--output", str(tree / "out"), "--recursive"]
    for _ in range(2):  # the second time its own overlays lie in the tree
        assert cli.main(arguments) == 0
        names = {path.name for path in (tree / "out").iterdir()}
        assert names == {"x.png", "x_2.png", "predictions.json", "categories.json"}
        inputs = {record["file_name"] for record in results(tree / "out")}
        assert inputs == {str(tree / "a" / "x.png"), str(tree / "b" / "x.png")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["f_9.png", "--track"], "--track needs videos, and f_9.png is a single image"),
        ([".", "--track", "--track-patience", "-1"], "the patience of tracks is -1; expected"),
        ([".", "--track", "--track-min-iou", "2"], "the least IoU of a track is 2.0; expected"),
        ([".", "--track", "--tracker", "x"], "the tracker is 'x'; expected one of sort, bytetrack"),
        ([".", "--track-patience", "5"], "--track-patience and --track-min-iou go with --track"),
        ([".", "--fps", "5"], "--fps is for numbered images such as frames_%05d.png"),
        (["f_%d.png", "--fps", "0"], "--fps is 0.0; expected a number above 0"),
        (["f_%d.png", "--fps", "nan"], "--fps is nan; expected a number above 0"),
        (
            ["rtsp://u:secret@h/live", "--resume"],
            "stream rtsp://h/live cannot show its earlier frames",
        ),
        (["file:///v.mp4"], "--input 'file:///v.mp4' cannot be read; expected a file, a folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    model: list[str],
    walk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(walk)
    assert_refused([*model, "--output", str(tmp_path), "--input", *arguments], message, capsys)
