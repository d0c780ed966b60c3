"""The file of a video that ``instseg predict --resume`` is to go on with, damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from instseg.errors import ConfigError, OutputError
from instseg.predict.records import VideoRecords, json_list

HEADER: dict[str, Any] = {"info": {"confidence": 0.5}, "videos": [{"id": 1}], "categories": []}


def frame(number: int) -> dict[str, Any]:
    return {"frame": number, "width": 4, "height": 3, "keyframe": True, "objects": []}


@pytest.mark.parametrize(
    ("first_line", "message"),
    [
        ('{"info": 5, "frames": [', "written with confidence None, not 0.5; it cannot be resumed"),
        ('{"info": [], "videos": {}, "frames": [', "written with confidence None"),
        ('{"info": {"confidence": 0.5}, "videos": 7, "frames": [', "written with video 7, not"),
        ('{"frames": [', "written with confidence None"),
    ],
)
def test_a_header_of_another_kind_is_refused(tmp_path: Path, first_line: str, message: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(f"{first_line}\n")
    with pytest.raises(ConfigError, match=message):
        VideoRecords(path, HEADER, resume=True)


FOUND: dict[str, Any] = {"category_id": 1, "bbox": [0, 0, 2.5, 3], "score": 0.5}
MASK = {"size": [3, 4], "counts": [2, 3, 7]}


def objects(*changes: dict[str, Any]) -> str:
    """The line of frame 2 with objects of these changes."""
    found = [FOUND | {"segmentation": MASK} | change for change in changes]
    return json.dumps(frame(2) | {"objects": found}) + ","


@pytest.mark.parametrize(
    "line",
    [
        *("5,", "[],", "{},", '{"keyframe": true},', "null,", "[" * 100_000),
        json.dumps(frame(1)),
        json.dumps(frame(2) | {"keyframe": "true"}),
        json.dumps(frame(2) | {"objects": [5]}),
        json.dumps(frame(2) | {"objects": None}),
        json.dumps(frame(2) | {"objects": [FOUND, FOUND | {"segmentation": MASK}]}),
        *(objects({}, {"bbox": box}) for box in ("1234", [1, 2, 3], [0, 0, "3", 4], None)),
        *(objects({"score": score}) for score in (float("nan"), "high", 10**400)),
        *(objects({"category_id": number}) for number in ("1", None, [1], 10**30)),
        objects({"segmentation": None}),
        objects({"segmentation": MASK | {"counts": [2, 3, 70_000_000]}}),
        objects({"segmentation": MASK | {"size": [10**6, 10**6]}}),
    ],
)
def test_what_comes_before_a_line_that_is_no_frame_is_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "v.json"
    with VideoRecords(path, HEADER, resume=False) as records:
        for number in range(3):
            records.add(frame(number))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    again = VideoRecords(path, HEADER, resume=True)
    assert again.kept == 1  # the last key frame before it is done anew
    assert not again.complete
    with again:
        assert list(again.earlier()) == [frame(0)]
    assert json.loads(path.read_text())["frames"] == [frame(0)]


def test_frames_with_and_without_objects_and_masks_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    header = HEADER | {"categories": [{"id": "a", "name": "b"}]}
    masked = FOUND | {"category_id": "a", "segmentation": MASK}
    written = [frame(0), frame(1) | {"objects": [FOUND]}, frame(2) | {"objects": [masked, masked]}]
    with VideoRecords(path, header, resume=False) as records:
        for record in [*written, frame(3)]:
            records.add(record)
    with VideoRecords(path, header, resume=True) as again:
        assert list(again.earlier()) == written


def test_a_folder_in_place_of_the_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        VideoRecords(tmp_path, HEADER, resume=True)


def test_the_results_of_pictures_are_valid_json_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    added: list[dict[str, Any]] = []
    with json_list(path) as add:
        assert json.loads(path.read_text()) == []
        for records in ([], [FOUND, {"category_name": "å"}], [], [FOUND] * 1000):
            add(iter(records))
            added += records
            assert json.loads(path.read_text()) == added
    assert json.loads(path.read_text()) == added


def test_the_list_of_images_is_valid_json_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "categories.json"
    head = {"info": {"rank_by": "class"}, "categories": [{"id": 7, "name": "å"}]}
    with json_list(path, head, "images") as add:
        assert json.loads(path.read_text()) == head | {"images": []}
        for number in range(3):
            add([{"id": number}])
            images = [{"id": n} for n in range(number + 1)]
            assert json.loads(path.read_text()) == head | {"images": images}
