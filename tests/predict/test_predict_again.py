"""A second run of ``instseg predict`` into the folder of an earlier one."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from instseg import cli
from instseg.data.videos import Frame, VideoWriter
from instseg.errors import OutputError
from instseg.predict.earlier import MARK, marked, remove_earlier, tell_others
from instseg.predict.records import write_image
from instseg.predict.sources import Source
from tests.inference.test_predictor import PHOTO
from tests.support.predict_common import (
    arguments_for_tiny_model,
    assert_refused,
    results,
    save_config,
)
from tests.support.video_common import images, write_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return arguments_for_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two images and a video of one frame."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.fromarray(PHOTO).save(folder / name)
    write_clip(folder / "v.mp4", images(1))
    return folder


def names(output: Path) -> set[str]:
    """All files, and folders without any."""
    return {
        str(path.relative_to(output))
        for path in output.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


ALL = {"a.png", "b.jpg", "predictions.json", "categories.json", "v.json", "v.mp4"}


def test_a_second_run_replaces_the_masks_and_overlays_of_the_first(
    model: list[str], inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [*model, "--input", str(inputs), "--output", str(output), "--instance-masks"]
    assert cli.main(arguments) == 0
    first = names(output)
    assert first > ALL and {name.split("_")[0] for name in first - ALL} == {"a", "b", "v"}
    (output / "a_masks" / "notes.txt").write_text("mine")
    assert cli.main([*arguments, "--confidence", "1", "--no-overlay"]) == 0
    assert results(output) == []
    kept = {"predictions.json", "categories.json", "v.json", "a_masks/notes.txt"}
    assert names(output) == kept


def test_an_input_that_fails_now_leaves_no_results_of_an_earlier_run(
    model: list[str], inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [*model, "--input", str(inputs), "--output", str(output)]
    assert cli.main(arguments) == 0
    for name in ("a.png", "v.mp4"):
        (inputs / name).write_text("<html>404</html>")
    assert cli.main(arguments) == 1
    assert names(output) == ALL - {"a.png", "v.json", "v.mp4"}


def test_results_of_other_inputs_are_named_and_stay(
    model: list[str], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [*model, "--output", str(output), "--input"]
    assert cli.main([*arguments, str(inputs), "--instance-masks"]) == 0
    assert "not in this run" not in capsys.readouterr().err
    for name in ("mine.png", "mine.json", "b.mp4"):
        (output / name).write_bytes(b"mine")
    first = names(output)
    assert cli.main([*arguments, str(inputs / "a.png")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "not in this run" in line]
    assert len(lines) == 1
    assert lines[0].endswith("stay as they are: b.jpg, b_masks, v.json, v.mp4, v_masks")
    assert {name for name in names(output) if not name.startswith("a")} == {
        name for name in first if not name.startswith("a")
    }


def test_a_resumed_run_keeps_what_it_goes_on_with(
    model: list[str], inputs: Path, tmp_path: Path
) -> None:
    arguments = [*model, "--input", str(inputs / "v.mp4"), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert cli.main([*arguments, "--resume"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    text = before["v.json"].decode()
    (tmp_path / "out" / "v.json").write_text(text.splitlines()[0])
    assert cli.main([*arguments, "--resume", "--no-overlay"]) == 0
    assert names(tmp_path / "out") == {"v.json"}  # the overlay was that of the first run
    assert json.loads((tmp_path / "out" / "v.json").read_text()) == json.loads(text)


def test_nothing_is_removed_before_the_model_is_built(
    model: list[str], inputs: Path, tmp_path: Path
) -> None:
    arguments = [*model, "--input", str(inputs), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    (tmp_path / "bad.pth").write_text("no weights")
    assert cli.main([*arguments, "--weights", str(tmp_path / "bad.pth")]) == 2
    assert names(tmp_path / "out") == ALL


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, []) for name in sorted(ALL)),
        ("predictions.jsonl", []),
        ("v.jsonl", []),
        ("a.geojson", ["--format", "coco,geojson"]),
        ("measurements.csv", ["--format", "csv"]),
        ("b.tiles.jsonl", ["--tile", "64"]),
    ],
)
def test_a_file_of_the_user_in_place_of_results_is_refused_at_once(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str]
) -> None:
    """The weights are none, so the model was not built."""
    if words:  # a warning says that formats are for images
        (inputs / "v.mp4").unlink()
    save_config(tmp_path / "tiny.yaml")
    (tmp_path / "bad.pth").write_text("no weights")
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("mine")
    settings = ["--config-file", f"{tmp_path}/tiny.yaml", "--weights", f"{tmp_path}/bad.pth"]
    arguments = ["predict", *settings, "--input", str(inputs), "--output", str(output), *words]
    message = f"{name} is in the way, and no run of instseg predict wrote it"
    assert_refused(arguments, message, capsys)
    if name != "v.mp4":  # of a video that may be complete
        assert_refused([*arguments, "--resume"], message, capsys)
    assert names(output) == {name} and (output / name).read_text() == "mine"


def test_files_of_the_user_that_are_not_written_now_stay(
    model: list[str], inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    mine = ("a.png", "b.jpg", "v.mp4", "a.geojson", "measurements.csv")
    for name in mine:
        (output / name).write_text("mine")
    words = ["--input", str(inputs), "--output", str(output), "--no-overlay"]
    assert cli.main([*model, *words]) == 0
    assert all((output / name).read_text() == "mine" for name in mine)


def test_an_image_of_the_user_is_not_replaced_by_a_mask_or_an_overlay(tmp_path: Path) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    for name in ("a.png", "b.png"):
        with pytest.raises(OutputError, match=f"{name} is in the way"):
            write_image(tmp_path / name, image)
    assert (tmp_path / "a.png").read_text() == (tmp_path / "b.png").read_text() == "mine"


def test_files_of_the_user_and_links_are_never_removed(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (output / "a_masks", elsewhere):
        folder.mkdir(parents=True)
    image = np.zeros((4, 4, 3), np.uint8)
    for path in (elsewhere / "000_cat.png", output / "a_masks" / "000_cat.png", output / "b.png"):
        write_image(path, image)
    for path in (output / "a.png", output / "a.jpg", output / "a_masks" / "001_cat.png"):
        assert cv2.imwrite(str(path), image)
    shutil.copy(output / "b.png", output / "a_masks" / "mine.png")  # not the name of a mask
    write_clip(output / "v.mp4", images(1))
    (output / "v.json").write_text('{"info": "mine"}')
    (output / "c_masks").symlink_to(elsewhere)
    (output / "c.png").symlink_to(elsewhere / "000_cat.png")
    sources = [Source("a.x", "a", "image"), Source("c.x", "c", "image")]
    sources.append(Source("v.x", "v", "video"))
    before = names(output)
    remove_earlier(output, sources, resume=False)
    assert before - names(output) == {"a_masks/000_cat.png"}
    assert (elsewhere / "000_cat.png").is_file()


def test_many_results_of_other_inputs_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(9):
        write_image(tmp_path / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
    tell_others(tmp_path, [Source("8.png", "8", "image")])
    [message] = caplog.messages
    assert message.endswith("stay as they are: 0.png, 1.png, 2.png, 3.png, 4.png and 3 more")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("shape", [(1, 1), (50, 70), (50, 70, 3)])
def test_a_marked_image_is_the_image(suffix: str, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plain = cv2.imencode(suffix, image)[1]
    data = marked(plain.tobytes())
    assert MARK.encode() in data[:200]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    expected = cv2.imdecode(plain, cv2.IMREAD_UNCHANGED)
    assert pixels is not None and expected is not None and np.array_equal(pixels, expected)


def test_a_marked_image_is_one_for_pillow_too(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / name, np.full((4, 4, 3), 90, np.uint8))
        with Image.open(tmp_path / name) as image:
            image.load()
            note = image.info.get("Software") or image.info["comment"].decode()
        assert note == MARK


def test_a_video_that_a_killed_run_left_is_known(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 10, comment=MARK) as writer:
        for number, image in enumerate(images(60)):
            writer.write(Frame(image, number / 10))
        shutil.copy(tmp_path / "v.mp4", tmp_path / "killed.mp4")
    remove_earlier(tmp_path, [Source("k", "killed", "video")], resume=False)
    assert names(tmp_path) == {"v.mp4"}
