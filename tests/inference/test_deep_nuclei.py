"""Copies of the nuclei with 12 and 16 bits: models find in them what is in the originals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from instseg import Predictor
from instseg.data.images import read_image, read_pixels
from instseg.data.intensity import Intensity
from instseg.masks import encode, ious
from tests.conftest import ROOT, load_module
from tests.inference.test_predictor import assert_same, tiny_cfg

tifffile = pytest.importorskip("tifffile")

COUNT = 3
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


@pytest.mark.parametrize(("bits", "noise"), [(16, 0.0), (12, 0.0), (16, 0.25), (12, 0.25)])
def test_deep_copies_of_nuclei_give_the_instances_of_the_originals(
    originals: Path,
    data_root: Path,
    tmp_path: Path,
    predictor: Predictor,
    bits: int,
    noise: float,
) -> None:
    for deep in deep_set(originals, data_root, tmp_path, bits, noise):
        original = data_root / "nuclei/images" / f"{deep.stem}.png"
        pixels = read_pixels(deep)
        assert pixels.dtype == np.uint16 and 2 ** (bits - 3) < pixels.max() < 2**bits
        expected = read_image(original, intensity=PERCENTILE).astype(int)
        difference = np.abs(read_image(deep, intensity=PERCENTILE) - expected)
        # What a step of the 8-bit image is after stretching, noise included.
        low, high = np.percentile(read_pixels(original)[:, :, 0], (1, 99.8))
        assert difference.max() <= 1 + 255 / (high - low) * 6 * noise
        one, other = (predictor(path)["instances"] for path in (original, deep))
        assert len(one) == len(other) > 0
        masks = [[encode(mask.numpy()) for mask in x.pred_masks] for x in (one, other)]
        matched = ious(masks[0], masks[1]).max(axis=1)
        assert (matched > 0.8).mean() > (0.9 if noise else 0.99)


def test_a_16_bit_copy_gives_the_very_instances(
    originals: Path, data_root: Path, tmp_path: Path, predictor: Predictor
) -> None:
    """Multiplied only, so that rounding changes nothing."""
    name = json.loads(originals.read_text())["images"][0]["file_name"]
    pixels = read_pixels(data_root / "nuclei/images" / name)[:, :, 0]
    tifffile.imwrite(tmp_path / "a.tif", pixels.astype(np.uint16) * 257)
    assert_same(predictor(tmp_path / "a.tif"), predictor(data_root / "nuclei/images" / name))
    assert_same(predictor(pixels.astype(np.uint16) * 257), predictor(tmp_path / "a.tif"))


def test_an_exported_network_scales_as_its_model_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    from instseg.export import ExportedPredictor, export
    from tests.support.yolact_tiny import PHOTO, decided, same_detections, tiny_predictor

    keys = ["INPUT.NORMALIZE", "range", "INPUT.NORMALIZE_RANGE", (500.0, 40000.0)]
    model = tiny_predictor("yolact", *keys, "INPUT.CHANNELS", (1, 1, 0))
    decided(model.model)
    export(model, "onnx", tmp_path / "a.onnx")
    exported = ExportedPredictor(tmp_path / "a.onnx")
    assert exported.intensity == Intensity("range", (500.0, 40000.0), (1, 1, 0))
    tifffile.imwrite(tmp_path / "a.tif", PHOTO.astype(np.uint16) * 200, photometric="rgb")
    assert len(model(tmp_path / "a.tif")["instances"]) > 0
    same_detections(exported(tmp_path / "a.tif"), model(tmp_path / "a.tif"))
