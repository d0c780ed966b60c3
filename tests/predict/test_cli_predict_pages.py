"""``instseg predict --pages`` on stacks, and INPUT.NORMALIZE on the command line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instseg import cli
from instseg.data.images import read_image
from instseg.data.intensity import Intensity
from instseg.data.videos import VideoFile
from instseg.errors import ConfigError
from instseg.predict import pages
from instseg.predict.pages import Pages, take_pages
from instseg.predict.sources import Source
from tests.data.test_tiff import damage_page
from tests.support.predict_common import arguments_for_tiny_model, results
from tests.support.video_common import images

tifffile = pytest.importorskip("tifffile")

NORMALIZE = ["INPUT.NORMALIZE", "percentile"]
COUNT = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return arguments_for_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stack() -> np.ndarray:
    """(5, 48, 64) uint16: frames of a walk with 12 bits and an offset."""
    grey = np.stack([image.astype(np.uint16).sum(2) for image in images(COUNT)])
    return (grey * 5 + 300).astype(np.uint16)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def named(records: list[dict[str, Any]]) -> set[tuple[str, Any]]:
    return {(Path(record["file_name"]).name, record.get("page")) for record in records}


def test_each_page_is_an_image_with_results_of_its_own(
    model: list[str], stack: np.ndarray, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack)
    for number, page in enumerate(stack):
        (tmp_path / "pages").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "pages" / f"{number}.tif", page)
    for name, input, more in (("out", "a.tif", ["--pages", "all"]), ("single", "pages", [])):
        arguments = [*model, "--input", str(tmp_path / input), "--output", str(tmp_path / name)]
        assert cli.main([*arguments, *more, *NORMALIZE]) == 0
    stacked, single = results(tmp_path / "out"), results(tmp_path / "single")
    keys = {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert len(stacked) == len(single) > 0
    for one, other in zip(stacked, single, strict=True):
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
        assert one["page"] == one["image_id"] - 1 and one["file_name"] == str(tmp_path / "a.tif")
    entries = read_json(tmp_path / "out/categories.json")["images"]
    assert [(x["id"], x["page"]) for x in entries] == [(i + 1, i) for i in range(COUNT)]
    for number in range(COUNT):
        overlay = (tmp_path / f"out/a_page000{number}.png").read_bytes()
        assert overlay == (tmp_path / f"single/{number}.png").read_bytes()


@pytest.mark.parametrize(
    ("pages", "taken", "missing"),
    [
        ("1", {1}, None),
        ("1:3", {1, 2}, None),
        ("3:", {3, 4}, None),
        (":2", {0, 1}, None),
        ("3:9", {3, 4}, 5),
        ("7", set(), 7),
    ],
)
def test_an_interval_beyond_the_end_is_one_line_and_the_rest_is_done(
    model: list[str],
    stack: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pages: str,
    taken: set[int],
    missing: int | None,
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack, compression="zlib", metadata=None)
    arguments = [*model, "--input", str(tmp_path / "a.tif"), "--output", str(tmp_path / "out")]
    arguments += ["--pages", pages, "--no-overlay", *NORMALIZE]
    assert cli.main(arguments) == (missing is not None)
    entries = read_json(tmp_path / "out/categories.json")["images"]
    assert named(entries) == {("a.tif", number) for number in taken}
    lines = [line for line in capsys.readouterr().err.splitlines() if "a.tif" in line]
    if missing is None:
        assert lines == []
    else:
        reason = f"there is no page {missing}: it has 5 pages, counted from 0"
        assert lines == [f"{tmp_path}/a.tif: {reason}"]


def test_damaged_pages_and_files_are_one_line_each_and_the_rest_is_done(
    model: list[str], stack: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    tifffile.imwrite(folder / "bad_page.tif", stack, compression="zlib", metadata=None)
    damage_page(folder / "bad_page.tif", 1)
    tifffile.imwrite(folder / "cut.tif", stack, metadata=None)
    content = (folder / "cut.tif").read_bytes()
    (folder / "cut.tif").write_bytes(content[: len(content) // 2])
    (folder / "html.tif").write_text("<html>")
    tifffile.imwrite(folder / "nan.tif", np.full((48, 64), np.nan, np.float32))
    tifffile.imwrite(folder / "one.tif", stack[0])
    Image.fromarray((stack[0] // 16).astype(np.uint8)).save(folder / "photo.png")
    arguments = [*model, "--input", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--pages", "all", "--no-overlay", *NORMALIZE]) == 1
    expected = {("bad_page.tif", number) for number in (0, 2, 3, 4)} | {("cut.tif", 0)}
    expected |= {("one.tif", None), ("photo.png", None)}
    assert named(read_json(tmp_path / "out/categories.json")["images"]) == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line]
    assert [line.removeprefix(f"{folder}/").split(":")[0] for line in lines] == [
        "bad_page.tif page 1",
        "cut.tif",
        "html.tif",
        "nan.tif",
    ]


def test_with_track_the_pages_of_a_stack_are_the_frames_of_one_video(
    model: list[str], stack: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("trackers", reason="needs the extra 'video'")
    folder = tmp_path / "in"
    folder.mkdir()
    tifffile.imwrite(folder / "a.tif", stack)
    for number in range(2):
        tifffile.imwrite(folder / f"f{number}.tif", stack[number])
    arguments = [*model, "--input", str(folder), "--track", "--pages", "1:4"]
    arguments += ["--output", str(tmp_path / "out"), "--fps", "5", *NORMALIZE]
    assert cli.main(arguments) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.json", "a.mp4", "in.json", "in.mp4"}
    content = read_json(tmp_path / "out/a.json")
    assert content["info"]["pages"] == "1:4"
    frames = content["frames"]
    assert [(frame["file_name"], frame["page"]) for frame in frames] == [
        ("a.tif", number) for number in (1, 2, 3)
    ]
    assert any("track_id" in entry for frame in frames for entry in frame["objects"])
    assert len(read_json(tmp_path / "out/in.json")["frames"]) == 2
    shown = next(iter(VideoFile(tmp_path / "out/a.mp4"))).image
    page = read_image(folder / "a.tif", page=1, intensity=Intensity("percentile"))
    assert shown.shape == page.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pages", "some"], "--pages is 'some'; expected all, the number of a page"),
        (["--pages", "3:3"], "--pages is '3:3'; expected all"),
        (["--pages", "-1"], "--pages is '-1'; expected all"),
        (["--pages", "9" * 400], "--pages is '999"),
        (["--track"], "is a single image; give .*, or a stack with --pages all"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    model: list[str],
    stack: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack)
    given = [*model, "--input", str(tmp_path / "a.tif"), "--output", str(tmp_path / "out")]
    joined = [f"{arguments[0]}={arguments[1]}"] if len(arguments) > 1 else arguments
    assert cli.main([*given, *joined]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.search(message, lines[-1]) and len(lines) == 1


def test_pages_are_taken_of_stacks_alone(stack: np.ndarray, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack)
    (tmp_path / "bad.tif").write_bytes(b"II*\0\x08\0\0\0\x05\0")
    video, bad = Source("a.mp4", "a", "video"), Source(str(tmp_path / "bad.tif"), "bad", "image")
    given = [video, bad, Source(str(tmp_path / "a.tif"), "a", "image")]
    for as_videos in (False, True):
        *others, last = take_pages(given, Pages.parse("1:3"), as_videos=as_videos)
        assert others[:2] == [video, bad]  # which is reported when it is read
        assert (last.page, last.pages) == ((None, (1, 2)) if as_videos else (2, ()))


def test_pages_without_tifffile_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--pages needs the package tifffile.*; type: pip inst"):
        Pages.parse("all")


def test_pages_of_a_data_set_are_refused(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*model, "--images-of", "shapes_val", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--pages", "all"]) == 2
    assert "--pages goes with --input, not with --images-of" in capsys.readouterr().err


def test_a_stack_without_pages_names_the_option(
    model: list[str], stack: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack)
    arguments = [*model, "--input", str(tmp_path / "a.tif"), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, *NORMALIZE]) == 1
    assert (
        "a.tif: is a TIFF of 5 images; expected one in a file: `instseg predict --pages all`"
        in (capsys.readouterr().err)
    )
