"""``instseg predict --tile``: large images on the command line, and runs that are resumed."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from instseg import Predictor, cli
from instseg.data.intensity import ModelImage
from instseg.errors import ConfigError
from instseg.inference.layout import Layout, Rect
from instseg.inference.tile_sources import TileSource
from instseg.masks import CroppedMasks, decode
from instseg.predict.tile_records import TileRecords
from instseg.predict.tiled import scaled_down
from tests.inference.test_stitching import scattered, square
from tests.inference.test_tiles import Exact, drawn
from tests.support.predict_common import arguments_for_tiny_model, results
from tests.support.tiles import Instance, as_set, trimmed

GROUND_TRUTH = scattered(0, 130, 160)
IMAGE = drawn(GROUND_TRUTH, 130, 160)
TILES = ["--tile", "64", "--overlap", "24"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run on two images by a predictor without error."""
    monkeypatch.setattr(Predictor, "stream", lambda self, images, **_: Exact().stream(images))
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), IMAGE if name == "a" else IMAGE[::-1])
    words = arguments_for_tiny_model(tmp_path)
    inputs = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    return [*words, "--input", *inputs, "--output", str(tmp_path / "out")]


def interrupt(monkeypatch: pytest.MonkeyPatch, arguments: list[str], *, after: int) -> None:
    """Start a run, and interrupt it after some tiles."""
    monkeypatch.setattr(
        Predictor, "stream", lambda self, images, **_: Exact(fail_after=after).stream(images)
    )
    assert cli.main([*arguments, *TILES]) == 130


def found_in(output: Path, image_id: int) -> list[Instance]:
    masks = [
        decode(record["segmentation"], 130, 160)
        for record in results(output)
        if record["image_id"] == image_id
    ]
    return [trimmed(0, 0, mask) for mask in masks]  # type: ignore[misc]


def test_every_instance_of_a_large_image_is_in_the_results_once(
    arguments: list[str], tmp_path: Path
) -> None:
    assert cli.main([*arguments, *TILES]) == 0
    output = tmp_path / "out"
    assert as_set(found_in(output, 1)) == as_set(GROUND_TRUTH)
    assert len(found_in(output, 2)) == len(GROUND_TRUTH)
    scores = [record["score"] for record in results(output) if record["image_id"] == 1]
    assert scores == sorted(scores, reverse=True)
    images = json.loads((output / "categories.json").read_text())["images"]
    assert [(x["id"], x["width"], x["height"]) for x in images] == [(1, 160, 130), (2, 160, 130)]
    assert sorted(file.name for file in output.iterdir()) == [
        "a.png",
        "b.png",
        "categories.json",
        "predictions.json",
    ]
    assert cv2.imread(str(output / "a.png")).shape == (130, 160, 3)


def test_the_memory_of_dense_masks_limits_neither_results_nor_overlay(
    arguments: list[str], tmp_path: Path
) -> None:
    few = f"{5 * 130 * 160 / 1e9:.9f}"
    assert cli.main([*arguments, *TILES, "--", "TEST.MASK_MEMORY", few]) == 0
    assert (tmp_path / "out" / "a.png").exists()
    assert len(found_in(tmp_path / "out", 1)) == len(GROUND_TRUTH)


def test_a_folder_of_zarr_is_an_image_for_tiles(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zarr = pytest.importorskip("zarr")
    array = zarr.open_array(tmp_path / "c.zarr", mode="w", shape=IMAGE.shape, dtype=IMAGE.dtype)
    array[:] = IMAGE[:, :, ::-1]  # files hold RGB
    words = [*arguments, "--input", str(tmp_path / "c.zarr")]
    assert cli.main([*words, *TILES]) == 0
    assert as_set(found_in(tmp_path / "out", 1)) == as_set(GROUND_TRUTH)
    assert cli.main(words) == 1
    line = "c.zarr: is a folder of zarr, which only prediction by tiles reads: use --tile 1024"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("change", ["image", "weights"])
def test_a_file_that_changed_is_not_resumed(
    change: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(monkeypatch, arguments, after=7)
    weights = Path(arguments[arguments.index("--weights") + 1])
    file = tmp_path / "a.png" if change == "image" else weights
    os.utime(file, ns=(0, 0))
    assert cli.main([*arguments, *TILES, "--resume"]) == 2
    assert "it cannot be resumed" in capsys.readouterr().err


@pytest.mark.parametrize("tiles", [0, 7, 12])
def test_a_run_that_was_interrupted_goes_on_to_the_same_result(
    tiles: int, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*arguments, *TILES]) == 0
    expected = (tmp_path / "out" / "predictions.json").read_bytes()
    predicted: list[int] = []

    def stream(self: Any, images: Iterable[Any], stop: int | None) -> Iterator[dict[str, Any]]:
        for result in Exact().stream(images):
            if len(predicted) == stop:
                raise KeyboardInterrupt
            predicted.append(1)
            yield result

    words = [*arguments[:-1], str(tmp_path / "again"), *TILES]
    monkeypatch.setattr(Predictor, "stream", lambda self, images, **_: stream(self, images, tiles))
    assert cli.main(words) == 130
    done = [file for file in (tmp_path / "again").iterdir() if file.name.endswith(".tiles.jsonl")]
    assert sum(len(file.read_text().splitlines()) - 1 for file in done) == tiles
    monkeypatch.setattr(Predictor, "stream", lambda self, images, **_: stream(self, images, None))
    assert cli.main([*words, "--resume"]) == 0
    assert len(predicted) == 24, "a tile was predicted twice"
    assert (tmp_path / "again" / "predictions.json").read_bytes() == expected
    assert not list((tmp_path / "again").glob("*.jsonl"))


def test_a_run_without_resume_starts_anew(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, arguments, after=3)
    assert (tmp_path / "out" / "a.tiles.jsonl").exists()
    monkeypatch.setattr(Predictor, "stream", lambda self, images, **_: Exact().stream(images))
    assert cli.main([*arguments, "--tile", "48"]) == 0
    assert as_set(found_in(tmp_path / "out", 1)) == as_set(GROUND_TRUTH)


def test_a_run_with_other_settings_is_not_resumed(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(monkeypatch, arguments, after=3)
    capsys.readouterr()
    assert cli.main([*arguments, "--tile", "64", "--overlap", "30", "--resume"]) == 2
    assert "was written with overlap 24, not 30; it cannot be resumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overlap", "9"], "--overlap goes with --tile"),
        (["--tile", "0"], "tile is 0; expected the side of a tile in pixels"),
        (["--tile", "64", "--overlap", "64"], "overlap is 64 with tiles of 64 pixels; expected 0"),
        (["--tile", "64", "--instance-masks"], "leave it or --tile out"),
        (["--tile", "64", "--input", "0"], "--tile divides images, and 0 is a camera"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, *words]) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_a_line_and_the_rest_is_done(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_text("<html>404</html>")
    assert cli.main([*arguments, *TILES]) == 1
    assert "a.png: is HTML" in capsys.readouterr().err
    assert len(found_in(tmp_path / "out", 1)) == len(GROUND_TRUTH)


def instances_of_a_tile() -> Instances:
    """With numbers that have no short decimal form, and a mask without pixels."""
    torch.manual_seed(0)
    instances = Instances((40, 50))
    masks = torch.rand(4, 40, 50) > 0.5
    masks[2] = False
    instances.pred_masks = CroppedMasks.from_dense(masks)
    instances.pred_boxes = Boxes(torch.rand(4, 4) * 40)
    instances.scores, instances.mask_scores = torch.rand(4), torch.rand(4).double()
    instances.pred_classes = torch.tensor([0, 3, 2, 2**40])
    return instances


def assert_equal(one: Instances, other: Instances) -> None:
    assert (
        one.image_size == other.image_size and one.get_fields().keys() == other.get_fields().keys()
    )
    assert torch.equal(one.pred_masks.to_dense(), other.pred_masks.to_dense())
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
    for name in ("scores", "mask_scores", "pred_classes"):
        assert one.get(name).dtype == other.get(name).dtype
        assert torch.equal(one.get(name), other.get(name))


LAYOUT = Layout(40, 90, 50, 10)
HEADER = {"info": {"config": "a.yaml", "tile": 50}, "image": {"file_name": "a.png"}}


def test_what_is_kept_of_a_tile_is_exact(tmp_path: Path) -> None:
    given, nothing = instances_of_a_tile(), instances_of_a_tile()[:0]
    with TileRecords(tmp_path / "a.tiles.jsonl", HEADER, LAYOUT, resume=False) as records:
        records.add(given)
        records.add(nothing)
    with TileRecords(tmp_path / "a.tiles.jsonl", HEADER, LAYOUT, resume=True) as records:
        first, second = records.earlier()
    assert_equal(first, given)
    assert_equal(second, nothing)


def test_a_file_that_was_cut_anywhere_goes_on_after_its_last_whole_tile(tmp_path: Path) -> None:
    path, given = tmp_path / "a.tiles.jsonl", instances_of_a_tile()
    with TileRecords(path, HEADER, LAYOUT, resume=False) as records:
        records.add(given)
        records.add(given)
    content = path.read_bytes()
    first, second, _ = (len(line) for line in content.splitlines(keepends=True))
    for length in [
        0,
        *range(20, first + 3, 5),
        first + second - 1,
        first + second,
        len(content) - 1,
    ]:
        path.write_bytes(content[:length])
        with TileRecords(path, HEADER, LAYOUT, resume=True) as records:
            earlier = list(records.earlier())
            assert len(earlier) == (length >= first + second)
            for _ in range(2 - len(earlier)):
                records.add(given)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"float32"', '"load"'),
        lambda text: text.replace('"scores"', '"points"'),
        lambda text: text.replace('"masks": ["', '"masks": ["0000'),
        lambda text: text.replace('"fields"', '"other"'),
    ],
)
def test_a_damaged_line_is_predicted_again(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tiles.jsonl"
    with TileRecords(path, HEADER, LAYOUT, resume=False) as records:
        records.add(instances_of_a_tile())
    path.write_text(damage(path.read_text()))
    with TileRecords(path, HEADER, LAYOUT, resume=True) as records:
        assert list(records.earlier()) == []


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tiles.jsonl"
    with TileRecords(path, HEADER, LAYOUT, resume=False):
        pass
    other = {**HEADER, "image": {"file_name": "b.png"}}
    with (
        pytest.raises(ConfigError, match="was written with file_name a.png, not b.png"),
        TileRecords(path, other, LAYOUT, resume=True),
    ):
        pass


@pytest.mark.parametrize(
    ("first_line", "difference"),
    [
        ('{"info": {"config": 5}}', "config 5, not a.yaml"),
        ('{"info": {"config": "a.ya', "config None, not a.yaml"),
        (json.dumps(HEADER | {"image": 5}), "file_name None, not a.png"),
        (json.dumps(HEADER | {"more": {}}), "other settings"),
    ],
)
def test_a_damaged_header_is_not_resumed(first_line: str, difference: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tiles.jsonl"
    path.write_text(f"{first_line}\n")
    with (
        pytest.raises(ConfigError, match=f"was written with {difference}; it cannot be resumed"),
        TileRecords(path, HEADER, LAYOUT, resume=True),
    ):
        pass
    assert path.read_text() == f"{first_line}\n"


def test_a_file_of_others_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.tiles.jsonl"
    path.write_text("mine")
    with (
        pytest.raises(OSError, match="no run of instseg predict wrote it"),
        TileRecords(path, HEADER, LAYOUT, resume=False),
    ):
        pass
    assert path.read_text() == "mine"


def test_an_overlay_is_scaled_down_with_its_instances() -> None:
    image = np.zeros((300, 410, 3), np.uint8)
    image[100:200, 40:80] = 200

    def read(rect: Rect) -> Any:
        from instseg.data.intensity import ModelImage

        return ModelImage(image[rect.y0 : rect.y1, rect.x0 : rect.x1])

    source = TileSource(300, 410, read)
    instances = Instances((300, 410))
    crops: list[Instance] = [square(40, 100, 40, 100), square(0, 0, 1), square(1, 1, 1)]
    corners = [(x, y) for x, y, _ in crops]
    instances.pred_masks = CroppedMasks.from_crops([x[2] for x in crops], corners, (300, 410))
    instances.pred_boxes = Boxes(instances.pred_masks.boxes.float())
    instances.scores = torch.tensor([0.9, 0.8, 0.7])
    drawn_image, scaled = scaled_down(source, instances, longest=150)
    assert drawn_image.shape == (100, 137, 3)
    assert scaled.image_size == scaled.pred_masks.image_size == (100, 137)
    # Of the single pixels only the middle one of a square of 3 x 3 is left.
    assert scaled.scores.tolist() == pytest.approx([0.9, 0.7])
    (mask, pixel) = scaled.pred_masks.to_dense()
    assert torch.equal(mask, torch.from_numpy(drawn_image[:, :, 0] > 80))
    assert pixel.nonzero().tolist() == [[0, 0]]
    same_image, same = scaled_down(source, instances, longest=410)
    assert same is instances and (same_image == image).all()


def test_a_band_of_an_overlay_counts_the_bytes_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instseg.predict.tiled._BAND", 48_000)
    heights: dict[int, list[int]] = {}
    for pixel_bytes in (3, 120):
        rows = heights[pixel_bytes] = []

        def read(rect: Rect, rows: list[int] = rows) -> ModelImage:
            rows.append(rect.y1 - rect.y0)
            return ModelImage(np.zeros((rect.y1 - rect.y0, 100, 3), np.uint8))

        scaled_down(TileSource(200, 100, read, pixel_bytes), Instances((200, 100)))
    assert heights == {3: [64, 64, 64, 8], 120: [4] * 50}
