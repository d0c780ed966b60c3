"""Prediction in bfloat16: close to that in float32, which what follows the network keeps."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import instseg
from instseg import cli
from instseg.errors import ConfigError
from instseg.inference import auto_precision, precision
from instseg.inference.predictor import Predictor
from instseg.training.trainer import Trainer
from tests.inference.test_predictor import PHOTO, tiny_cfg
from tests.support.predict_common import results
from tests.support.yolact_tiny import decided, tiny_predictor


@pytest.mark.parametrize("optimize", [False, True])
def test_a_network_gives_nearly_what_it_gives_in_float32(optimize: bool, tmp_path: Path) -> None:
    plain = tiny_predictor("yolact")
    decided(plain.model)
    torch.save({"model": plain.model.state_dict()}, tmp_path / "model.pth")
    low = Predictor(plain.cfg, tmp_path / "model.pth", dtype="bfloat16", optimize=optimize)
    assert (plain.dtype, low.dtype) == ("float32", "bfloat16")
    convolutions = [x for x in low.model.modules() if isinstance(x, nn.Conv2d)]
    assert convolutions and all(x.weight.dtype == torch.bfloat16 for x in convolutions)
    images = torch.randn(1, 3, 72, 72)
    with torch.no_grad():
        expected = plain.model.raw(images)
        with precision.precision("bfloat16", "cpu"):
            outputs = low.model.raw(images)
    for one, other in zip(outputs, expected, strict=True):
        difference = (one.float() - other).norm() / other.norm()
        assert 1e-5 < difference < 0.05, f"{difference:.5f} of float32"


def test_scores_boxes_and_masks_of_two_stage_models_are_made_in_float32() -> None:
    torch.manual_seed(0)
    predictor = Predictor(tiny_cfg(), dtype="bfloat16")
    outputs = []
    heads = predictor.model.roi_heads
    heads.box_predictor.register_forward_hook(lambda *x: outputs.append(x[2][0].dtype))
    heads.mask_head.predictor.register_forward_hook(lambda *x: outputs.append(x[2].dtype))
    instances = predictor(PHOTO)["instances"]
    # These hooks are called before those of the prediction.
    assert outputs == [torch.bfloat16, torch.bfloat16] and len(instances)
    assert instances.scores.dtype == instances.pred_boxes.tensor.dtype == torch.float32
    rounded = instances.scores.to(torch.bfloat16).float()
    assert not torch.equal(rounded, instances.scores), "the softmax ran in bfloat16"


def test_a_type_that_there_is_not_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="DTYPE_TEST is .float16.; expected float32, bfloat16 or auto"
    ):
        Predictor(tiny_cfg(), dtype="float16")


def test_the_command_line_takes_the_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = Predictor(tiny_cfg(), dtype="bfloat16")
    cfg = predictor.cfg.clone()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": Predictor(tiny_cfg()).model.state_dict()}, tmp_path / "model.pth")
    Image.fromarray(PHOTO[:, :, ::-1]).save(tmp_path / "a.png")
    arguments = ["predict", "--config-file", str(tmp_path / "config.yaml"), "--confidence", "0"]
    arguments += ["--weights", str(tmp_path / "model.pth"), "--input", str(tmp_path / "a.png")]
    scores = {}
    for dtype in precision.DTYPES:
        folder = tmp_path / dtype
        assert cli.main([*arguments, "--output", str(folder), "--dtype", dtype]) == 0
        scores[dtype] = [x["score"] for x in results(folder)]
    assert scores["float32"] and scores["float32"] != scores["bfloat16"]


def test_evaluation_computes_in_the_type_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, data_root: Path
) -> None:
    autocasts = []

    def noted(cls, *arguments):
        autocasts.append(torch.is_autocast_enabled("cpu"))
        return {}

    monkeypatch.setattr(Trainer, "_test", classmethod(noted))
    for dtype in precision.DTYPES:
        overrides = ["MODEL.DEVICE", "cpu", "MODEL.DTYPE_TEST", dtype]
        Trainer.test(instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", overrides), nn.Identity())
    assert autocasts == [False, True]


@pytest.mark.parametrize(
    "text, slow",
    [
        ("flags\t\t: fpu avx2 avx512f\nbugs\t: bf16", True),
        ("flags\t\t: fpu amx_bf16", False),
        ("processor\t: 0\nFeatures\t: fp bf16", False),
    ],
)
def test_a_processor_without_the_instructions_is_warned_of_once(
    text: str, slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"{text}\n")
    precision.cpuinfo.cache_clear()
    precision.has_bfloat16.cache_clear()
    precision._warn_slow.cache_clear()
    with caplog.at_level(logging.WARNING, logger="instseg"):
        for _ in range(2):
            precision.precision("bfloat16", "cpu")
        precision.precision("float32", "cpu")
    monkeypatch.undo()
    precision.cpuinfo.cache_clear()
    precision.has_bfloat16.cache_clear()
    assert len(caplog.records) == slow
    assert not slow or "has no instructions (avx512_bf16 or amx_bf16)" in caplog.text


def changed(monkeypatch: pytest.MonkeyPatch, able: bool, largest: float = 0.05) -> None:
    """A processor with or without instructions, and what counts as equal."""
    monkeypatch.setattr(auto_precision, "has_bfloat16", lambda: able)
    monkeypatch.setattr(auto_precision, "_LARGEST_DIFFERENCE", largest)


@pytest.mark.parametrize(
    ("able", "largest", "dtype", "reason"),
    [
        (True, 0.05, "bfloat16", "its outputs in bfloat16 differ by 1."),
        (True, 1e-5, "float32", "its outputs in bfloat16 differ by 1."),
        (False, 0.05, "float32", "cpu has no instructions for bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_that_is_fast_and_equal_enough(
    able: bool,
    largest: float,
    dtype: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed(monkeypatch, able, largest)
    with caplog.at_level(logging.INFO, logger="instseg"):
        predictor = tiny_predictor("yolact", dtype="auto")
    assert predictor.dtype == predictor.cfg.MODEL.DTYPE_TEST == dtype
    assert f"MODEL.DTYPE_TEST auto is {dtype}: {reason}" in caplog.text
    assert not predictor.model.training
    assert len(predictor(PHOTO)["instances"]) == 50


def test_auto_compares_the_features_of_two_stage_models(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, able=True)
    torch.manual_seed(0)
    assert Predictor(tiny_cfg(), dtype="auto").dtype == "bfloat16"
    changed(monkeypatch, able=True, largest=0.0)
    assert Predictor(tiny_cfg(), dtype="auto").dtype == "float32"


def test_auto_is_float32_for_a_network_that_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, able=True)
    cfg = tiny_cfg()
    cfg.MODEL.DTYPE_TEST = "auto"
    model = nn.Identity().train()
    assert auto_precision.chosen_dtype(cfg, model) == "float32" and model.training
