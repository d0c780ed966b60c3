"""Damaged files of videos with which ``instseg predict --resume`` is to go on."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instseg.errors import ConfigError, OutputError
from instseg.predict.records import JsonLines, VideoRecords

HEADER: dict[str, Any] = {
    "info": {"config": "c.yaml", "confidence": 0.5},
    "videos": [{"id": 1}],
    "categories": [],
}


def frame(number: int) -> dict[str, Any]:
    return {"frame": number, "width": 4, "height": 3, "keyframe": True, "objects": []}


@pytest.mark.parametrize(
    ("first_line", "message"),
    [
        ('{"info": 5, "frames": [', "written with config None, not c.yaml; it cannot be resumed"),
        ('{"info": [], "videos": {}, "frames": [', "written with config None"),
        (
            '{"info": {"config": "c.yaml", "confidence": 0.5}, "videos": 7, "frames": [',
            "written with video 7, not",
        ),
        ('{"info": {"config": "c.yaml"}, "frames": [', "written with confidence None, not 0.5"),
        ('{"frames": [', "written with config None"),
        (
            json.dumps(HEADER | {"categories": [{"id": 1, "name": "x"}]})[:-1] + ', "frames": [',
            "written with other categories; it cannot be resumed",
        ),
        ("5", "written with config None"),
        ("[]", "written with config None"),
        ('{"info": 5}', "written with config None"),
    ],
)
@pytest.mark.parametrize("name", ["v.json", "v.jsonl"])
def test_a_header_of_another_kind_is_refused(
    tmp_path: Path, name: str, first_line: str, message: str
) -> None:
    (tmp_path / name).write_text(f"{first_line}\n")
    with pytest.raises(ConfigError, match=message):
        VideoRecords(tmp_path / "v.json", HEADER, resume=True)


ENTRY: dict[str, Any] = {"category_id": 1, "bbox": [0, 0, 2.5, 3], "score": 0.5}
MASK = {"size": [3, 4], "counts": [2, 3, 7]}


def objects(*changes: dict[str, Any]) -> str:
    """The line of frame 2 with instances of these changes."""
    entries = [ENTRY | {"segmentation": MASK} | change for change in changes]
    return json.dumps(frame(2) | {"objects": entries}) + ","


@pytest.mark.parametrize(
    "line",
    [
        *("5,", "[],", "{},", '{"keyframe": true},', "null,", "[" * 100_000),
        json.dumps(frame(1)),
        json.dumps(frame(2) | {"keyframe": "true"}),
        json.dumps(frame(2) | {"objects": [5]}),
        json.dumps(frame(2) | {"objects": None}),
        json.dumps(frame(2) | {"objects": [ENTRY, ENTRY | {"segmentation": MASK}]}),
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
    masked = ENTRY | {"category_id": "a", "segmentation": MASK}
    written = [frame(0), frame(1) | {"objects": [ENTRY]}, frame(2) | {"objects": [masked, masked]}]
    with VideoRecords(path, header, resume=False) as records:
        for record in [*written, frame(3)]:
            records.add(record)
    with VideoRecords(path, header, resume=True) as again:
        assert list(again.earlier()) == written


def test_a_folder_in_place_of_the_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        VideoRecords(tmp_path, HEADER, resume=True)


def test_while_results_grow_each_is_a_line_and_then_they_are_a_list(tmp_path: Path) -> None:
    path, lines = tmp_path / "predictions.json", tmp_path / "predictions.jsonl"
    path.write_text("[\n]\n")  # of an earlier run
    added: list[dict[str, Any]] = []
    with JsonLines(path) as file:
        for records in ([], [ENTRY, {"category_name": "å"}], [], [ENTRY] * 1000):
            file.add(*records)
            added += records
            assert [json.loads(line) for line in lines.open()] == added
            assert not path.exists()
    assert json.loads(path.read_text()) == added
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("head", [{}, {"info": {"rank_by": "[]"}, "categories": [{"id": 7}]}])
def test_the_list_of_images_follows_what_is_said_of_all(
    tmp_path: Path, head: dict[str, Any]
) -> None:
    path = tmp_path / "categories.json"
    with JsonLines(path, head, "images") as file:
        for number in range(3):
            images = [{"id": n} for n in range(number + 1)]
            file.add(images[-1])
            lines = path.with_suffix(".jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [head, *images]
    assert json.loads(path.read_text()) == head | {"images": images}


def test_an_error_joins_the_lines_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), JsonLines(tmp_path / "a.json") as file:
        file.add(ENTRY)
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "a.json").read_text()) == [ENTRY]


def test_a_join_that_fails_leaves_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="a.json cannot be written: No space left"):
        with JsonLines(tmp_path / "a.json") as file:
            file.add(ENTRY)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert json.loads((tmp_path / "a.jsonl").read_text()) == ENTRY


@pytest.mark.parametrize("stem", ["n" * 249, "n" * 250, "å" * 125])
def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.json"
    with JsonLines(path) as file:
        file.add(ENTRY)
    assert json.loads(path.read_text()) == [ENTRY]


def test_lines_of_another_program_are_refused_and_stay(tmp_path: Path) -> None:
    (tmp_path / "clip.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(OutputError, match="clip.jsonl is in the way, .* choose another --output"):
        with JsonLines(tmp_path / "clip.json") as file:
            file.add(ENTRY)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.jsonl"]
    assert (tmp_path / "clip.jsonl").read_text() == '{"mine": 1}\n'


def test_lines_that_are_no_json_are_not_resumed_but_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match="clip.jsonl is in the way"):
        with VideoRecords(tmp_path / "clip.json", HEADER, resume=True):
            pass
    assert (tmp_path / "clip.jsonl").read_text() == "mine\n"


def test_a_list_of_the_user_is_refused_and_stays(tmp_path: Path) -> None:
    for text in ("[]", '[{"image_id": 1}]'):
        (tmp_path / "predictions.json").write_text(text)
        with pytest.raises(OutputError, match="predictions.json is in the way, and no run of"):
            with JsonLines(tmp_path / "predictions.json") as file:
                file.add(ENTRY)
        assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]
        assert (tmp_path / "predictions.json").read_text() == text


def test_an_empty_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    with JsonLines(tmp_path / "a.json") as file:
        file.add(ENTRY)
    assert json.loads((tmp_path / "a.json").read_text()) == [ENTRY]


def test_lines_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for target in ("mine", "nowhere"):
        (tmp_path / "a.jsonl").symlink_to(tmp_path / target)
        with pytest.raises(OutputError, match="a.jsonl is in the way"):
            with JsonLines(tmp_path / "a.json") as file:
                file.add(ENTRY)
        (tmp_path / "a.jsonl").unlink()
    assert not (tmp_path / "mine").stat().st_size and len(list(tmp_path.iterdir())) == 1


_KILLED = """
import os, signal, sys
from pathlib import Path
from instseg.predict.records import JsonLines
with JsonLines(Path(sys.argv[1])) as file:
    for number in range(3):
        file.add({"id": number})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_a_line_for_each_result(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text("[\n]\n")  # of an earlier run, not to be taken for that of the killed one
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)])
    assert done.returncode == -signal.SIGKILL
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": number} for number in range(3)]
    assert not path.exists()
