"""Released Mask Scoring R-CNN checkpoints: the same numbers after conversion, bad files refused.

``golden/mask_scoring_rcnn`` holds activations of the authors' own detector; see the README there.
"""

import contextlib
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.modeling import build_model
from torch import nn

import instseg
from instseg.checkpoint import Checkpointer, read_weights
from instseg.cli import main
from instseg.convert import Options, convert_file
from instseg.errors import CheckpointError, ConfigError
from instseg.projects.mask_scoring_rcnn import convert_maskscoring_rcnn as maskscoring_rcnn
from tests.conftest import GOLDEN, close, load_module

FOLDER = GOLDEN / "mask_scoring_rcnn"
CONFIG = "mask_scoring_rcnn/mask_scoring_rcnn_R_50_FPN_coco.yaml"
LEVELS = {"p2": 2, "p3": 2, "p4": 1, "p5": 1, "p6": 1}
PIXEL_MEAN = (102.9801, 115.9465, 122.7717)
State = dict[str, torch.Tensor]
Writer = Callable[[dict[str, list[int]]], str]
PARTIAL = Options(allow_partial=True)


def keys(depth: int = 50) -> dict[str, list[int]]:
    entries = json.loads((FOLDER / f"keys_e2e_R{depth}_FPN.json").read_text())
    return {name: entry["shape"] for name, entry in entries.items()}


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "golden.npz")


@pytest.fixture(scope="module")
def inputs() -> ModuleType:
    return load_module(FOLDER / "inputs.py")


@pytest.fixture(scope="module")
def conversion(
    golden_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A whole checkpoint in the authors' layout through the command, and what was printed."""
    folder = tmp_path_factory.mktemp("released")
    state = {k: torch.from_numpy(golden_weights.fill(k, shape)) for k, shape in keys().items()}
    state["backbone.body.stem.conv1.weight"] /= 64
    torch.save({"model": state, "iteration": 90000}, folder / "released.pth")
    arguments = [str(folder / "released.pth"), str(folder / "ours.safetensors")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["convert", "maskscoring_rcnn", *arguments]) == 0
    (folder / "released.pth").unlink()
    return folder / "ours.safetensors", printed.getvalue()


@pytest.fixture(scope="module")
def model(conversion: tuple[Path, str]) -> nn.Module:
    model = build_model(instseg.load_cfg(CONFIG, ["MODEL.DEVICE", "cpu"])).eval()
    Checkpointer(model).load(str(conversion[0]))
    return model


@pytest.fixture(scope="module")
def features(model: nn.Module, golden_weights: ModuleType) -> State:
    image = golden_weights.image(128, 192).astype(np.float32) - np.float32(PIXEL_MEAN)
    with torch.no_grad():
        return model.backbone(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])


@pytest.mark.parametrize("level", LEVELS)
def test_pyramid_and_rpn_equal_the_authors(
    model: nn.Module, features: State, golden: Any, level: str
) -> None:
    step = LEVELS[level]
    close(features[level][0, ::8, ::step, ::step], golden[level])
    with torch.no_grad():
        (objectness,), (deltas,) = model.proposal_generator.rpn_head([features[level]])
    close(objectness[0, :, ::step, ::step], golden[f"rpn_objectness_{level}"])
    close(deltas[0, :, ::step, ::step], golden[f"rpn_deltas_{level}"])


def test_the_box_head_equals_the_authors(model: nn.Module, golden: Any, inputs: ModuleType) -> None:
    """Their background is row 0 of the classes and the first four deltas."""
    heads = model.roi_heads
    with torch.no_grad():
        pooled = torch.from_numpy(
            inputs.roi_features(rois=len(golden["box_cls_logits"]), base=9500, size=7)
        )
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
    close(logits.roll(1, dims=1), golden["box_cls_logits"])
    close(deltas, golden["box_deltas"][:, 4:])


def test_the_mask_head_equals_the_authors(
    model: nn.Module, golden: Any, inputs: ModuleType
) -> None:
    """Stored are their classes 0, 4, ..., 80; class 0 is the background."""
    with torch.no_grad():
        pooled = torch.from_numpy(
            inputs.roi_features(rois=len(golden["mask_head_logits"]), base=9600, size=14)
        )
        logits = model.roi_heads.mask_head.layers(pooled)
    close(logits[:, 3::4, ::2, ::2], golden["mask_head_logits"][:, 1:])


def test_the_maskiou_head_equals_the_authors(
    model: nn.Module, golden: Any, inputs: ModuleType
) -> None:
    labels = torch.from_numpy(golden["labels"])
    logits = torch.from_numpy(inputs.mask_logits())
    masks = logits[torch.arange(len(labels)), labels][:, None].sigmoid()
    with torch.no_grad():
        predicted = model.roi_heads.maskiou_head(torch.from_numpy(inputs.roi_features()), masks)
    close(predicted, golden["pred_maskiou"][:, 1:])


def test_the_report_accounts_for_every_tensor_of_the_file(conversion: tuple[Path, str]) -> None:
    lines = [line.split() for line in conversion[1].splitlines()]
    mapped = {line[1]: line[3] for line in lines if line[0] == "mapped"}
    ignored = {line[1] for line in lines if line[0] == "ignored"}
    assert mapped.keys() | ignored == keys().keys()
    assert ignored == {f"rpn.anchor_generator.cell_anchors.{i}" for i in range(5)}
    assert mapped["backbone.body.layer2.0.downsample.1.bias"] == (
        "backbone.bottom_up.res3.0.shortcut.norm.bias"
    )
    assert "321 tensors mapped, 5 ignored, 0 left out, 0 missing" in conversion[1]


@pytest.fixture
def released(tmp_path: Path) -> Writer:
    """Writes a checkpoint of zeros, each of which takes a few bytes on the disk."""

    def write(shapes: dict[str, list[int]]) -> str:
        state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
        torch.save({"model": state}, tmp_path / "released.pth")
        return str(tmp_path / "released.pth")

    return write


def test_a_file_of_a_deeper_backbone_is_recognised(released: Writer) -> None:
    stage = {name: shape for name, shape in keys(101).items() if ".layer3." in name}
    state, report = maskscoring_rcnn.convert(released(stage), PARTIAL)
    assert report.config == "mask_scoring_rcnn/mask_scoring_rcnn_R_101_FPN_coco.yaml"
    assert len(state) == len(stage)


def test_a_file_saved_on_several_gpus_is_converted(released: Writer) -> None:
    path = released({"module.backbone.fpn.fpn_inner1.bias": [256]})
    state, _ = maskscoring_rcnn.convert(path, PARTIAL)
    assert list(state) == ["backbone.fpn_lateral2.bias"]


def of_classes(count: int) -> dict[str, list[int]]:
    """Shapes of the layers that depend on the number of classes, background included."""
    layers = {
        "box.predictor.cls_score": [count, 1024],
        "box.predictor.bbox_pred": [4 * count, 1024],
        "mask.predictor.mask_fcn_logits": [count, 256, 1, 1],
        "maskiou.predictor.maskiou": [count, 1024],
    }
    weights = {f"roi_heads.{name}.weight": shape for name, shape in layers.items()}
    return {**weights, **{f"roi_heads.{name}.bias": shape[:1] for name, shape in layers.items()}}


def test_a_file_for_other_classes_says_which_key_to_set(released: Writer) -> None:
    state, report = maskscoring_rcnn.convert(released(of_classes(4)), PARTIAL)
    assert report.overrides == ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    assert state["roi_heads.maskiou_head.maskiou.weight"].shape == (3, 1024)


def test_class_layers_are_left_out_on_request_and_reported(released: Writer) -> None:
    path = released({**of_classes(81), "backbone.fpn.fpn_inner1.bias": [256]})
    options = Options(leave_out_classes=True, allow_partial=True)
    state, report = maskscoring_rcnn.convert(path, options)
    assert list(state) == ["backbone.fpn_lateral2.bias"]
    assert sum(report.left_out.values(), ()) == tuple(of_classes(81))
    assert not [name for name in report.missing if "maskiou_head.maskiou." in name]


def test_an_unknown_tensor_is_refused_by_name(released: Writer) -> None:
    path = released({**keys(), "roi_heads.keypoint.fcn1": [3]})
    with pytest.raises(CheckpointError, match=r"1 of its 327 tensors .* roi_heads\.keypoint\.fcn1"):
        maskscoring_rcnn.convert(path, PARTIAL)


def test_a_missing_tensor_is_refused_by_our_name(released: Writer) -> None:
    shapes = keys()
    del shapes["roi_heads.maskiou.predictor.maskiou.bias"]
    with pytest.raises(CheckpointError, match=r"missing: roi_heads\.maskiou_head\.maskiou\.bias"):
        maskscoring_rcnn.convert(released(shapes), Options())


def test_a_part_is_converted_on_request_and_the_rest_reported(released: Writer) -> None:
    path = released({"backbone.fpn.fpn_inner1.bias": [256]})
    state, report = maskscoring_rcnn.convert(path, PARTIAL)
    assert list(state) == ["backbone.fpn_lateral2.bias"]
    assert len(report.missing) == 320
    assert "roi_heads.box_head.fc1.weight" in report.missing


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(released: Writer) -> None:
    path = released({"roi_heads.mask.predictor.mask_fcn_logits.weight": [91, 256, 1, 1]})
    with pytest.raises(CheckpointError, match=r"\(91, 256, 1, 1\).* needs \(81, 256, 1, 1\)"):
        maskscoring_rcnn.convert(path, PARTIAL)


@pytest.mark.parametrize("rows", [0, 1, 10**6])
def test_an_impossible_number_of_classes_is_refused(released: Writer, rows: int) -> None:
    path = released({"roi_heads.box.predictor.cls_score.bias": [rows]})
    with pytest.raises(CheckpointError, match=f"the classifier has {rows} outputs"):
        maskscoring_rcnn.convert(path, PARTIAL)


def test_our_own_checkpoint_is_refused_as_not_the_authors(tmp_path: Path) -> None:
    state = {"backbone.fpn_lateral2.bias": torch.zeros(256)}
    torch.save({"model": state}, tmp_path / "ours.pth")
    with pytest.raises(
        CheckpointError, match=r"1 of its 1 tensors .* backbone\.fpn_lateral2\.bias"
    ):
        maskscoring_rcnn.convert(str(tmp_path / "ours.pth"), PARTIAL)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = {"backbone.fpn.fpn_inner1.bias": torch.full((256,), float("nan"))}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"not a number \(NaN\) for backbone\.fpn\.fpn_inner1\.bias"
    ):
        maskscoring_rcnn.convert(str(tmp_path / "a.pth"), PARTIAL)


@pytest.fixture
def small(tmp_path: Path) -> str:
    torch.save({"model": {"backbone.fpn.fpn_inner1.bias": torch.ones(256)}}, tmp_path / "a.pth")
    return str(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("target", "written"),
    [("b", "b.safetensors"), ("b.safetensors", "b.safetensors"), ("b.pth", "b.pth")],
)
def test_the_name_of_the_result_decides_its_format(
    small: str, tmp_path: Path, target: str, written: str
) -> None:
    path, _ = convert_file("maskscoring_rcnn", small, tmp_path / target, PARTIAL)
    assert path == tmp_path / written
    content = read_weights(path)
    assert content["converted_from"] == "maskscoring_rcnn"
    assert torch.equal(content["model"]["backbone.fpn_lateral2.bias"], torch.ones(256))


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("maskscoring", "b.pth", "choose one of .*fcis, maskscoring_rcnn, matterport"),
        ("maskscoring_rcnn", "b.pkl", "must end in .safetensors or .pth"),
        ("maskscoring_rcnn", "a.pth", "is the file to convert"),
    ],
)
def test_a_conversion_that_cannot_be_meant_is_refused(
    small: str, tmp_path: Path, name: str, target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_file(name, small, tmp_path / target, PARTIAL)


class Payload:
    """Pickled, it makes a folder when it is loaded by an unprotected reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_payload_is_refused_and_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"a": Payload(tmp_path / "executed")}}, tmp_path / "a.pth")
    status = main(["convert", "maskscoring_rcnn", str(tmp_path / "a.pth"), str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert status == 2
    assert "nothing was executed" in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


def test_offsets_that_lie_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = safetensors.torch.save({"backbone.fpn.fpn_inner1.bias": torch.ones(256)})
    lying = content.replace(b"[0,1024]", b"[0,9024]")
    assert lying != content and struct.unpack("<Q", lying[:8])[0] < len(lying)
    (tmp_path / "a.safetensors").write_bytes(lying)
    path = str(tmp_path / "a.safetensors")
    status = main(["convert", "maskscoring_rcnn", "--allow-partial", path, str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert status == 2
    assert "is corrupt" in error and error.count("\n") == 1
    assert not (tmp_path / "b.safetensors").exists()
