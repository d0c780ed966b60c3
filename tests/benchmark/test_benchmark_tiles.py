"""``instseg benchmark tiles`` and ``tools/mosaic.py``: every way to slice runs and is scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from instseg import Predictor, cli
from instseg.benchmark import tiles
from instseg.benchmark.tiles import PEERS, Task, f1, measure, read_ground_truth
from instseg.data.images import read_image
from instseg.data.intensity import Intensity
from instseg.errors import ConfigError
from instseg.inference.layout import Layout
from instseg.masks import CroppedMasks, as_text, encode
from tests.conftest import ROOT, load_module
from tests.inference.test_predictor import tiny_cfg
from tests.inference.test_stitching import scattered, square
from tests.inference.test_tiles import Exact, drawn
from tests.support.tiles import Instance, straight_edges

GROUND_TRUTH = scattered(0, 130, 160, least=9)


def cropped(instances: list[Instance]) -> CroppedMasks:
    corners = np.array([x[:2] for x in instances]).reshape(-1, 2)
    return CroppedMasks.from_crops([x[2] for x in instances], corners, (130, 160))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """An image and a predictor without error, in this process."""
    tifffile = pytest.importorskip("tifffile")
    image = drawn(GROUND_TRUTH, 130, 160)
    tifffile.imwrite(tmp_path / "image.tif", image[:, :, ::-1], tile=(32, 32), photometric="rgb")
    annotations = [
        {"image_id": 1, "segmentation": {**rle, "counts": rle["counts"].decode()}}
        for rle in cropped(GROUND_TRUTH).to_rle()
    ]
    content = {"images": [{"id": 1, "width": 160, "height": 130}], "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(content))

    def stream(self: Predictor, images: Any, masks: str = "dense") -> Any:
        for result in Exact().stream(images):
            if masks == "dense":
                result["instances"].pred_masks = result["instances"].pred_masks.to_dense()
            yield result

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # sahi removes it
    monkeypatch.setattr(Predictor, "stream", stream)
    monkeypatch.setattr(Predictor, "__call__", lambda self, image: next(self.stream([image])))
    monkeypatch.setattr(tiles, "in_fresh_process", lambda function, *given: function(*given))
    ground_truth = read_ground_truth(str(tmp_path / "truth.json"))
    return Task(tiny_cfg().dump(), str(tmp_path / "image.tif"), ground_truth, 64, 24, 0.5)


@pytest.fixture
def command(task: Task, tmp_path: Path) -> list[str]:
    """That runs on the image of the task."""
    (tmp_path / "tiny.yaml").write_text(task.config)
    words = ["benchmark", "tiles", "--config-file", str(tmp_path / "tiny.yaml")]
    words += ["--input", task.image, "--truth", str(tmp_path / "truth.json")]
    return [*words, "--tile", "64", "--overlap", "24", "--peer", "supervision"]


@pytest.mark.parametrize("kind", ["instseg", *PEERS])
def test_every_way_finds_what_the_tiles_hold(kind: str, task: Task) -> None:
    pytest.importorskip(PEERS[kind].package if kind in PEERS else "torch")
    measurement = measure(kind, task)
    assert measurement.f1 == 1 if kind == "instseg" else 0.5 < measurement.f1 <= 1
    assert measurement.seconds > 0


def test_a_row_for_each_peer(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("supervision")
    assert cli.main([*command, "--json", str(tmp_path / "rows.json")]) == 0
    assert "| peer_f1" in capsys.readouterr().out.replace("  ", "").replace("|  ", "| ")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["f1"] == 1 and 0.5 < row["peer_f1"] <= 1
    assert row["peer"].startswith("supervision InferenceSlicer, compact masks 0.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peers": ["other"]}, "--peer is other; expected one of sahi, supervision"),
        ({"tile": 64, "overlap": 64}, "overlap is 64 with tiles of 64 pixels"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiles.benchmark_tiles("a.yaml", "a.tif", "a.json", **change)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "no.tif"], "no.tif: no such file"),
        (["--truth", "no.json"], "--truth no.json cannot be read: No such file or directory"),
        (["--truth", "list.json"], "--truth list.json is no ground truth in COCO's format"),
        (["--truth", "small.json"], "the first image of --truth small.json 9x8; give the ground"),
        (["--weights", "no.pth"], "no.pth"),
        (["INPUT.NORMALIZE", "percentile"], "INPUT.NORMALIZE is percentile and INPUT.CHANNELS ()"),
        (["INPUT.CHANNELS", "(0, 0, 1)"], "expected none and (): the other packages pass on tiles"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    words: list[str],
    message: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("supervision")
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    small = {"images": [{"id": 1, "width": 9, "height": 8}], "annotations": []}
    Path("small.json").write_text(json.dumps(small))
    assert cli.main([*command, *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]


def test_weights_given_need_not_have_the_checksum_of_the_configuration(
    command: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("supervision")
    weights = tmp_path / "weights.pth"
    torch.save({"model": Predictor(tiny_cfg()).model.state_dict()}, weights)
    file = tmp_path / "tiny.yaml"
    file.write_text(file.read_text().replace("WEIGHTS_SHA256: ''", f"WEIGHTS_SHA256: {'a' * 64}"))
    assert "a" * 64 in file.read_text()
    assert cli.main([*command, "--weights", str(weights)]) == 0


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instseg.optional.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package sahi.*instseg.benchmark"):
        tiles.benchmark_tiles("a.yaml", "a.tif", "a.json", peers=["sahi"])


def test_f1_counts_each_instance_once() -> None:
    ground_truth = cropped([square(0, 0, 10), square(20, 0, 10)])
    assert f1(ground_truth, ground_truth) == 1
    assert f1(cropped([square(0, 0, 10), square(0, 0, 9)]), ground_truth) == 0.5
    # An IoU of 0.5 is not above it.
    assert f1(cropped([square(0, 0, 5, 10), square(50, 50, 4)]), ground_truth) == 0
    assert f1(cropped([]), ground_truth) == 0
    assert f1(cropped([square(0, 0, 9)]), cropped([])) == 0


def test_an_image_of_a_mosaic_is_stretched_and_framed_by_its_background(tmp_path: Path) -> None:
    mosaic = load_module(ROOT / "tools/mosaic.py")
    pixels = np.random.default_rng(0).integers(10, 14, (40, 50), np.uint8)
    mask = np.zeros((40, 50), bool)
    mask[:20, :20] = True
    pixels[mask] += 50
    file = tmp_path / "image.png"
    Image.fromarray(pixels).save(file)
    record = {"file_name": str(file), "annotations": [{"segmentation": as_text(encode(mask))}]}
    framed = mosaic.framed_image(record, 3)
    expected = read_image(file, intensity=Intensity("percentile"))
    assert (framed[3:-3, 3:-3] == expected).all() and expected.max() == 255
    margin = framed[np.pad(np.zeros((40, 50), bool), 3, constant_values=True)]
    assert (margin == np.median(expected[~mask], axis=0)).all() and 0 < margin.max() < 30


def test_a_mosaic_is_its_images_with_their_ground_truth(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile")
    mosaic = load_module(ROOT / "tools/mosaic.py")
    count = mosaic.make(tmp_path / "m.tif", 600, "nuclei_val", seed=0, margin=8)
    image = tifffile.imread(tmp_path / "m.tif")
    content = json.loads((tmp_path / "m.json").read_text())
    ground_truth = read_ground_truth(str(tmp_path / "m.json"))
    assert image.shape == (600, 600) and len(ground_truth) == count > 20
    assert {(cell["x"], cell["y"]) for cell in content["cells"]} >= {(8, 8)}
    covered = ground_truth.to_dense().any(dim=0).numpy()
    assert image[covered].mean() > 2 * image[~covered].mean()
    # The prediction without error is worth everything, and without its half, half.
    annotations = content["annotations"]
    for kept, low, high in ((annotations, 100, 100), (annotations[::2], 55, 75)):
        records = [{**annotation, "score": 0.9} for annotation in kept]
        (tmp_path / "predictions.json").write_text(json.dumps(records))
        scores = mosaic.score(tmp_path / "m.json", tmp_path / "predictions.json", 0.5)
        assert low <= scores["F1"] <= high
        assert scores["AP50"] == 100 if low == 100 else scores["AP50"] < 75
    layout = Layout(600, 600, 128, 32)
    crops = [ground_truth.crop(index) for index in range(len(ground_truth))]
    assert mosaic.straight_edges(ground_truth, layout) == straight_edges(crops, layout)
