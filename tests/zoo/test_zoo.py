"""Shipped models by name: in Python, in commands, in training, and in stock Detectron2."""

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils import file_io
from detectron2.utils.file_io import PathManager

import instseg
from instseg import cli, shipped
from instseg.checkpoint import Checkpointer, read_weights
from instseg.data.synthetic import shapes
from instseg.errors import CheckpointError
from instseg.inference.predictor import Predictor
from tests.support import programs, tiny_zoo

ADDRESS = f"zoo://{tiny_zoo.NAME}"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    tiny_zoo.make(folder)
    return folder


@pytest.fixture(autouse=True)
def _ship(monkeypatch: pytest.MonkeyPatch, zoo: Path, tmp_path: Path) -> None:
    tiny_zoo.ship(monkeypatch, zoo)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights before they were rounded."""
    path = tmp_path_factory.mktemp("original") / "a.safetensors"
    return dict(tiny_zoo.save_tiny(path).state_dict())


def assert_rounded(weights: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == original.keys()
    for name, value in original.items():
        assert weights[name].dtype == value.dtype, name
        torch.testing.assert_close(weights[name], value, rtol=2**-10, atol=2**-24)


def test_a_predictor_from_the_zoo_has_float32_weights_and_all_that_belongs_to_them(
    original: dict[str, torch.Tensor],
) -> None:
    predictor = Predictor.from_zoo(tiny_zoo.NAME, batch_size=2)
    assert_rounded(predictor.model.state_dict(), original)
    assert predictor.categories == tiny_zoo.CLASSES
    assert predictor.largest_instance == 60
    assert predictor.batch_size == 2
    assert predictor.cfg.MODEL.ROI_BOX_HEAD.FC_DIM == 8  # an override of the entry
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert len(predictor(image)["instances"]) > 0


def test_an_override_of_the_user_comes_after_those_of_the_model() -> None:
    cfg = instseg.load_cfg(ADDRESS, ["MODEL.ROI_BOX_HEAD.FC_DIM", 16])
    assert cfg.MODEL.ROI_BOX_HEAD.FC_DIM == 16
    assert cfg.MODEL.WEIGHTS == ADDRESS


def test_an_unknown_name_is_one_line_with_those_that_are_close(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").touch()
    words = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert cli.main(["predict", "--model", "tiny_shape", *words]) == 2
    expected = "error: no shipped model is called 'tiny_shape'; did you mean tiny_shapes?\n"
    assert capsys.readouterr().err.endswith(expected)


def test_predict_takes_a_model_in_place_of_configuration_and_weights(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((48, 64, 3), 90, np.uint8))
    words = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    words += ["--confidence", "0", "TEST.DETECTIONS_PER_IMAGE", "3"]
    assert cli.main(["predict", "--model", tiny_zoo.NAME, *words]) == 0
    about = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert about["categories"] == tiny_zoo.CLASSES.as_coco()
    assert about["info"]["weights"] == ADDRESS
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert 0 < len(records) <= 3


@pytest.mark.parametrize("command", ["predict", "export", "benchmark models", "benchmark tiles"])
def test_a_command_takes_a_model_or_a_configuration_but_not_both(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--model", "a", "--config-file", "b"]) == 2
    assert "--config-file: not allowed with argument --model" in capsys.readouterr().err


def test_a_command_without_a_model_is_told_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "models"]) == 2
    assert "--config-file --model is required" in capsys.readouterr().err


def test_models_are_listed_as_a_table_and_as_json(
    capsys: pytest.CaptureFixture[str], zoo: Path
) -> None:
    assert cli.main(["models"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "system", "classes", "MB", "result", "ms"]
    size = shipped.shipped_models(zoo)[0].size / 1e6
    expected = f"tiny_shapes mask_rcnn disc, box, wedge {size:.1f} segm/AP 12.3 6"
    assert " ".join(row.split()) == expected
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tiny_zoo.manifest_of(zoo)["models"]


def test_an_empty_manifest_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped.write_manifest(tmp_path, [])
    tiny_zoo.ship(monkeypatch, tmp_path)
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out == "no models are shipped with this copy of instseg\n"


def test_a_shipped_model_is_evaluated_by_its_address_alone(tmp_path: Path) -> None:
    json_file = shapes.export("shapes_val", tmp_path / "data", limit=2)
    test_set = f"('coco:{json_file}:{tmp_path / 'data' / 'shapes_val'}',)"
    output = tmp_path / "out"
    words = ["--config-file", ADDRESS, "--eval-only", "OUTPUT_DIR", str(output)]
    done = programs.train_net(*words, "DATASETS.TEST", test_set, "DATALOADER.NUM_WORKERS", "0")
    assert done.returncode == 0, done.stderr
    written = instseg.load_cfg(output / "config.yaml")
    assert written.MODEL.WEIGHTS == ADDRESS
    assert written.MODEL.CATEGORIES == tiny_zoo.CLASSES.as_coco()


def test_fine_tuning_starts_from_a_shipped_model_with_other_classes(
    original: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*tiny_zoo.OVERRIDES, "MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.WEIGHTS", ADDRESS]
    cfg = instseg.load_cfg(tiny_zoo.CONFIG, overrides)
    torch.manual_seed(1)
    model = build_model(cfg)
    with caplog.at_level(logging.INFO, logger="instseg"):
        rest = Checkpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    name = "backbone.bottom_up.res3.0.conv1.weight"
    torch.testing.assert_close(model.state_dict()[name], original[name], rtol=2**-10, atol=2**-24)
    assert "roi_heads.box_predictor.cls_score" in caplog.text
    assert rest["categories"] == tiny_zoo.CLASSES.as_coco()


def test_stock_detectron2_loads_a_shipped_model_by_its_address(
    original: dict[str, torch.Tensor],
) -> None:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(_stock_part(instseg.load_cfg(ADDRESS), cfg))
    torch.manual_seed(1)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert_rounded(model.state_dict(), original)


def _stock_part(ours: Any, stock: Any) -> Any:
    """The keys of a configuration that stock Detectron2 has, too."""
    part = type(stock)()
    for key in stock:
        node = isinstance(stock[key], dict)
        part[key] = _stock_part(ours[key], stock[key]) if node else ours[key]
    return part


def test_the_address_is_a_pytorch_file_that_is_written_once(tmp_path: Path) -> None:
    first = Path(PathManager.get_local_path(ADDRESS))
    assert first.parent == tmp_path / "cache" / "instseg"
    written = first.stat().st_mtime_ns
    assert Path(PathManager.get_local_path(ADDRESS)) == first
    assert first.stat().st_mtime_ns == written
    content = torch.load(first, weights_only=True)
    assert {value.dtype for value in content["model"].values()} == {torch.float32, torch.int64}
    assert content["categories"] == tiny_zoo.CLASSES.as_coco()
    with PathManager.open(ADDRESS, "rb") as file:
        assert file.read() == first.read_bytes()
    with pytest.raises(CheckpointError, match="can only be read"):
        PathManager.open(ADDRESS, "wb")


def test_detectron2_learns_the_address_when_it_is_imported_after_instseg(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import sys, instseg; print(*[type(finder).__name__ for finder in sys.meta_path])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "_AddressesLater" in done.stdout
    name = "detectron2.utils.file_io"
    monkeypatch.setattr(name, file_io)  # the new module replaces it, which is undone
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [instseg._AddressesLater(), *sys.meta_path])
    manager = importlib.import_module(name).PathManager
    assert manager is not PathManager
    with pytest.raises(CheckpointError, match="no shipped model is called 'nothing'"):
        manager.get_local_path("zoo://nothing")
    assert not any(isinstance(finder, instseg._AddressesLater) for finder in sys.meta_path)


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, zoo: Path) -> Path:
    """A copy of the shipped weights, shipped in their place."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in zoo.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tiny_zoo.ship(monkeypatch, folder)
    return folder / f"{tiny_zoo.NAME}.safetensors"


def test_a_damaged_shipped_file_is_refused_with_both_hashes(damaged: Path) -> None:
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    message = (
        "checkpoint zoo://tiny_shapes has SHA-256 [0-9a-f]{64}, but that of "
        "tiny_shapes.safetensors in the manifest is [0-9a-f]{64}; .*; install instseg again"
    )
    with pytest.raises(CheckpointError, match=message):
        read_weights(ADDRESS)
    with pytest.raises(CheckpointError, match=message):
        PathManager.get_local_path(ADDRESS)


def test_a_listed_model_without_a_file_is_refused(damaged: Path) -> None:
    damaged.unlink()
    message = "lists tiny_shapes.safetensors for tiny_shapes, but there is no such file beside it"
    with pytest.raises(CheckpointError, match=message):
        read_weights(ADDRESS)


def test_a_hash_of_the_user_counts_for_a_shipped_model_too() -> None:
    with pytest.raises(CheckpointError, match=f"but MODEL.WEIGHTS_SHA256 is {'0' * 64}"):
        read_weights(ADDRESS, "0" * 64)
