"""``instseg predict --track``: instances numbered over time, and YouTube-VIS's layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from instseg import Predictor, cli
from instseg.data.videos import VideoFile
from instseg.errors import DatasetError
from instseg.predict import as_youtube_vis
from instseg.tracking import Tracker
from tests.inference.test_predictor import tiny_cfg
from tests.support.predict_common import arguments_for_tiny_model, as_lines
from tests.support.video_common import images, write_clip

pytest.importorskip("trackers", reason="needs the extra 'video'")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for the tiny model, with every instance it finds and all of them tracked."""
    arguments = arguments_for_tiny_model(tmp_path_factory.mktemp("model"))
    return [*arguments, "--track", "--no-overlay"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "v.mp4", images(6))


@pytest.fixture(scope="module")
def written(model: list[str], clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("written")
    assert cli.main([*model, "--input", str(clip), "--output", str(output)]) == 0
    return output / "v.json"


def test_objects_have_the_numbers_of_the_tracker(
    model: list[str], clip: Path, written: Path
) -> None:
    content = json.loads(written.read_text())
    assert content["info"]["track"] is True
    predictor, tracker = Predictor(tiny_cfg(), model[4]), Tracker()
    numbers = set()
    for record, frame in zip(content["frames"], VideoFile(clip), strict=True):
        expected = tracker.update(predictor(frame.image)["instances"]).tolist()
        track_ids = [entry["track_id"] for entry in record["objects"]]
        assert track_ids == [None if number < 0 else number for number in expected]
        numbers.update(expected)
    assert 0 in numbers and len(numbers) > 1


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_a_resumed_run_goes_on_with_the_same_tracks(
    model: list[str], clip: Path, written: Path, tmp_path: Path, frames: int
) -> None:
    text = written.read_text()
    (tmp_path / "v.jsonl").write_text("\n".join(as_lines(text).splitlines()[: frames + 1]))
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path), "--resume"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "v.json").read_text() == text


def test_a_file_with_tracks_becomes_the_list_of_youtube_vis(written: Path) -> None:
    tracks = as_youtube_vis(written, video_id=7)
    frames = json.loads(written.read_text())["frames"]
    objects = [entry for frame in frames for entry in frame["objects"]]
    tracked = [entry for entry in objects if entry["track_id"] is not None]
    assert len(tracks) == len({entry["track_id"] for entry in tracked})
    assert {track["video_id"] for track in tracks} == {7}
    assert all(len(track["segmentations"]) == 6 for track in tracks)
    masks = [mask for track in tracks for mask in track["segmentations"] if mask is not None]
    assert len(masks) == len(tracked)


def made_by_hand(folder: Path, **changes: Any) -> Path:
    """Two frames: instance 0 in both, instance 1 in the second, one without a number."""

    def entry(track: int | None, score: float, counts: str) -> dict[str, Any]:
        mask = {"size": [2, 2], "counts": counts}
        return {"category_id": 3, "score": score, "segmentation": mask, "track_id": track}

    first = {"objects": [entry(0, 0.5, "a"), entry(None, 0.9, "x")]}
    second = {"objects": [entry(1, 0.75, "c"), entry(0, 1.0, "b")]}
    path = folder / "v.json"
    path.write_text(json.dumps({"info": {"track": True}, "frames": [first, second]} | changes))
    return path


def test_a_track_has_a_mask_or_null_for_every_frame_and_its_mean_score(tmp_path: Path) -> None:
    first, second = as_youtube_vis(made_by_hand(tmp_path))
    mask_a, mask_b, mask_c = ({"size": [2, 2], "counts": text} for text in "abc")
    assert first == {
        "video_id": 1,
        "category_id": 3,
        "score": 0.75,
        "segmentations": [mask_a, mask_b],
    }
    assert (second["score"], second["segmentations"]) == (0.75, [None, mask_c])


def test_the_class_of_a_track_is_the_one_with_the_most_score(tmp_path: Path) -> None:
    path = made_by_hand(tmp_path)
    content = json.loads(path.read_text())
    content["frames"][1]["objects"][1]["category_id"] = 5  # of track 0, whose score grows there
    path.write_text(json.dumps(content))
    assert [track["category_id"] for track in as_youtube_vis(path)] == [5, 3]


def test_a_file_without_tracks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="was written without --track"):
        as_youtube_vis(made_by_hand(tmp_path, info={"track": False}))


def test_a_file_of_boxes_is_refused(tmp_path: Path) -> None:
    path = made_by_hand(tmp_path)
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        for entry in frame["objects"]:
            del entry["segmentation"]
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"v\.json holds boxes without masks"):
        as_youtube_vis(path)


@pytest.mark.parametrize("content", ["", "[]", '{"info": {}}', '{"info": {"track": true}, "frames'])
def test_what_is_no_file_of_a_video_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(DatasetError, match=r"v\.json is no complete file"):
        as_youtube_vis(tmp_path / "v.json")
