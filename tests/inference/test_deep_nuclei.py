"""Copies of the nuclei with 12 and 16 bits give the instances of the originals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from instseg import Predictor
from instseg.data.images import read_image, read_pixels
from instseg.data.intensity import Intensity
from tests.conftest import ROOT, load_module
from tests.inference.test_predictor import assert_same, tiny_cfg

tifffile = pytest.importorskip("tifffile")

COUNT = 3
NOISE = 0.25
PERCENTILE = Intensity("percentile")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(tiny_cfg("INPUT.NORMALIZE", "percentile", "TEST.DETECTIONS_PER_IMAGE", 20))


@pytest.fixture(scope="module")
def originals(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The annotations of some images of ``nuclei_val``."""
    content = json.loads((data_root / "nuclei/instances_val.json").read_text())
    path = tmp_path_factory.mktemp("nuclei") / "some.json"
    path.write_text(json.dumps({**content, "images": content["images"][:COUNT]}))
    return path


def deep_set(originals: Path, data_root: Path, folder: Path, bits: int, noise: float) -> list[Path]:
    tool = load_module(ROOT / "tools/deep_images.py")
    tool.write_set(originals, data_root / "nuclei/images", folder, bits, noise)
    names = [x["file_name"] for x in json.loads((folder / "some.json").read_text())["images"]]
    return [folder / "images" / name for name in names]


@pytest.mark.parametrize("bits", [12, 16])
def test_deep_copies_of_nuclei_are_scaled_to_the_originals(
    originals: Path, data_root: Path, tmp_path: Path, bits: int
) -> None:
    """Up to rounding and noise; what a trained network makes of them is measured elsewhere."""
    for deep in deep_set(originals, data_root, tmp_path, bits, NOISE):
        original = data_root / "nuclei/images" / f"{deep.stem}.png"
        pixels = read_pixels(deep)
        assert pixels.dtype == np.uint16 and 2 ** (bits - 3) < pixels.max() < 2**bits
        expected = read_image(original, intensity=PERCENTILE).astype(int)
        difference = np.abs(read_image(deep, intensity=PERCENTILE) - expected)
        # What a step of the 8-bit image is after stretching.
        low, high = np.percentile(read_pixels(original)[:, :, 0], (1, 99.8))
        assert difference.mean() <= 1 + 255 / (high - low) * NOISE


@pytest.mark.parametrize(("factor", "offset"), [(257, 0), (200, 3000), (14, 250)])
def test_deep_copies_of_nuclei_give_the_instances_of_the_originals(
    originals: Path,
    data_root: Path,
    tmp_path: Path,
    predictor: Predictor,
    factor: int,
    offset: int,
) -> None:
    """16 and 12 bits; whole factors, so that rounding changes nothing."""
    name = json.loads(originals.read_text())["images"][0]["file_name"]
    pixels = read_pixels(data_root / "nuclei/images" / name)[:, :, 0]
    deep = pixels.astype(np.uint16) * factor + offset
    tifffile.imwrite(tmp_path / "a.tif", deep.astype(np.uint16))
    expected = predictor(data_root / "nuclei/images" / name)
    assert_same(predictor(tmp_path / "a.tif"), expected)
    assert_same(predictor(deep.astype(np.uint16)), expected)
