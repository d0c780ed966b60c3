"""The file of a video that ``instseg predict --resume`` is to go on with, damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from instseg.errors import ConfigError
from instseg.predict.records import VideoRecords

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


@pytest.mark.parametrize("line", ["5,", "[],", "{},", '{"keyframe": true},', "null,"])
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
