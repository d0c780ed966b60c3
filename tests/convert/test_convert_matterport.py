"""Weights of matterport/Mask_RCNN give the same numbers after conversion.

``golden/mask_rcnn/golden_matterport.npz`` was computed by a PyTorch port of matterport's code; see
the README there.
"""

import contextlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.nn import functional as F

import instseg
from instseg.checkpoint import Checkpointer
from instseg.cli import main
from instseg.projects.mask_rcnn import SamePaddingStem
from tests.conftest import GOLDEN, close, load_module

FOLDER = GOLDEN / "mask_rcnn"
CONFIG = "mask_rcnn/mask_rcnn_R_101_FPN_matterport.yaml"
LEVELS = {"p2": 4, "p3": 2, "p4": 1, "p5": 1, "p6": 1}
ROWS = {"p2": 7, "p3": 3, "p4": 1, "p5": 1, "p6": 1}
ENTRIES = json.loads((FOLDER / "keys_matterport_resnet101.json").read_text())
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "golden_matterport.npz")


@pytest.fixture(scope="module")
def conversion(
    golden_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A whole file in matterport's layout through the command: the result and what was printed."""
    folder = tmp_path_factory.mktemp("released")
    recipe = load_module(FOLDER / "inputs.py")
    with h5py.File(folder / "released.h5", "w") as file:
        for entry in ENTRIES:
            file[entry["dataset"]] = recipe.matterport_array(entry, golden_weights.fill)
    arguments = [str(folder / "released.h5"), str(folder / "ours.safetensors")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["convert", "matterport", *arguments]) == 0
    (folder / "released.h5").unlink()
    return folder / "ours.safetensors", printed.getvalue()


@pytest.fixture(scope="module")
def printed(conversion: tuple[Path, str]) -> str:
    return conversion[1]


@pytest.fixture(scope="module")
def model(conversion: tuple[Path, str]) -> nn.Module:
    model = build_model(instseg.load_cfg(CONFIG, ["MODEL.DEVICE", "cpu"])).eval()
    Checkpointer(model).load(str(conversion[0]))
    return model


@pytest.fixture(scope="module")
def features(model: nn.Module, golden_weights: ModuleType) -> State:
    """Results for an RGB image, which the model normalises by the means of its configuration."""
    image = golden_weights.image(128, 128)[:, :, ::-1].transpose(2, 0, 1).copy()
    with torch.no_grad():
        images = model.preprocess_image([{"image": torch.from_numpy(image)}])
        return model.backbone(images.tensor)


@pytest.fixture(scope="module")
def pooled(features: State, golden: Any) -> dict[int, torch.Tensor]:
    """Region features by matterport's pooling, which differs from RoIAlign."""
    boxes = torch.from_numpy(golden["rois_yxyx_normalised"])
    return {size: crop_and_resize(features, boxes, size) for size in (7, 14)}


def crop_and_resize(features: State, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow's pooling on the pyramid level that matterport chooses (128 x 128 images).

    Args:
        boxes: (R, 4) y1, x1, y2, x2, where 0 and 1 are the centres of the outermost cells.
    """
    out = []
    for y1, x1, y2, x2 in boxes:
        side = ((y2 - y1) * (x2 - x1)).sqrt()
        level = int((4 + (side / (224 / 128)).log2().round()).clamp(2, 5))
        map_ = features[f"p{level}"][0]
        height, width = map_.shape[-2:]
        rows = y1 * (height - 1) + torch.arange(size) * ((y2 - y1) * (height - 1) / (size - 1))
        columns = x1 * (width - 1) + torch.arange(size) * ((x2 - x1) * (width - 1) / (size - 1))
        inside = ((rows >= 0) & (rows <= height - 1))[:, None]
        inside = inside & (columns >= 0) & (columns <= width - 1)
        top, bottom = (f(rows).long().clamp(0, height - 1) for f in (torch.floor, torch.ceil))
        left, right = (f(columns).long().clamp(0, width - 1) for f in (torch.floor, torch.ceil))
        across, down = columns - columns.floor(), (rows - rows.floor())[:, None]
        upper = map_[:, top][:, :, left].lerp(map_[:, top][:, :, right], across)
        lower = map_[:, bottom][:, :, left].lerp(map_[:, bottom][:, :, right], across)
        out.append(upper.lerp(lower, down) * inside)
    return torch.stack(out)


@pytest.mark.parametrize("level", LEVELS)
def test_pyramid_and_rpn_equal_matterports(
    model: nn.Module, features: State, golden: Any, level: str
) -> None:
    """Their objectness is two logits per anchor, their deltas begin with y."""
    step, rows = LEVELS[level], ROWS[level]
    close(features[level][0, ::8, ::step, ::step], golden[level])
    with torch.no_grad():
        (objectness,), (deltas,) = model.proposal_generator.rpn_head([features[level]])
    objectness = objectness[0].permute(1, 2, 0).flatten()[::rows]
    background, foreground = golden[f"rpn_logits_{level}"].T
    close(objectness, foreground - background)
    close(objectness.sigmoid(), golden[f"rpn_fg_prob_{level}"])
    deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[::rows]
    close(deltas[:, [1, 0, 3, 2]], golden[f"rpn_bbox_{level}"])


def test_anchors_equal_matterports(model: nn.Module, features: State, golden: Any) -> None:
    """Stored are the first six of each level, as y1, x1, y2, x2 in pixels."""
    anchors = model.proposal_generator.anchor_generator([features[level] for level in LEVELS])
    first = torch.cat([boxes.tensor[:6] for boxes in anchors])
    close(first[:, [1, 0, 3, 2]], golden["anchors_first_cells"], 1e-4)


def test_pooled_features_equal_matterports(pooled: dict[int, torch.Tensor], golden: Any) -> None:
    close(pooled[7][:, ::16], golden["pooled7"])
    close(pooled[14][:, ::32], golden["pooled14"])


def test_the_box_head_equals_matterports(
    model: nn.Module, pooled: dict[int, torch.Tensor], golden: Any
) -> None:
    heads = model.roi_heads
    with torch.no_grad():
        logits, deltas = heads.box_predictor(heads.box_head(pooled[7]))
    close(logits.roll(1, dims=1), golden["class_logits"])
    close(logits.softmax(1).roll(1, dims=1), golden["class_probs"])
    close(deltas.unflatten(1, (-1, 4))[..., [1, 0, 3, 2]], golden["bbox_deltas"][:, 1:])


def test_the_mask_head_equals_matterports(
    model: nn.Module, pooled: dict[int, torch.Tensor], golden: Any
) -> None:
    """Stored are their classes 0, 5, ..., 80; class 0 is the background."""
    with torch.no_grad():
        masks = model.roi_heads.mask_head.layers(pooled[14][: len(golden["mask_probs"])]).sigmoid()
    close(masks[:, 4::5], golden["mask_probs"][:, 1:])


def test_the_regression_weights_are_matterports(model: nn.Module) -> None:
    """It multiplies deltas by 0.1, 0.1, 0.2, 0.2 in the RPN as well."""
    assert tuple(model.proposal_generator.box2box_transform.weights) == (10, 10, 5, 5)
    assert tuple(model.roi_heads.box_predictor.box2box_transform.weights) == (10, 10, 5, 5)


@pytest.mark.parametrize(("size", "before"), [(8, 0), (7, 1), (9, 1)])
def test_the_stem_pools_as_tensorflow_does(size: int, before: int) -> None:
    """ "same" pads an even size behind only, an odd one on both sides, with minus infinity."""
    stem = SamePaddingStem(in_channels=3, out_channels=4, norm="")
    image = torch.randn(2, 3, 2 * size, 2 * size)
    with torch.no_grad():
        padded = F.pad(stem.conv1(image).relu(), (before, 1, before, 1), value=-torch.inf)
        assert torch.equal(stem(image), F.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("freeze_at", [0, 1])
def test_the_stem_is_frozen_as_the_configuration_says(freeze_at: int) -> None:
    overrides = ["MODEL.BACKBONE.NAME", "build_matterport_resnet_fpn_backbone"]
    overrides += ["MODEL.BACKBONE.FREEZE_AT", str(freeze_at)]
    stem = build_backbone(
        instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", overrides)
    ).bottom_up.stem
    assert isinstance(stem, SamePaddingStem)
    assert stem.conv1.weight.requires_grad == (freeze_at == 0)
    assert isinstance(stem.conv1.norm, FrozenBatchNorm2d) == (freeze_at == 1)


def test_the_report_accounts_for_every_tensor_of_the_file(printed: str) -> None:
    lines = [line.split() for line in printed.splitlines() if line.startswith("mapped ")]
    sources = {word for line in lines for word in line[1:-2]} - {"+"}
    assert sources == {entry["dataset"] for entry in ENTRIES}
    assert len(lines) == 562
    assert "562 tensors mapped, 0 ignored, 0 left out, 0 missing" in printed
    assert f"\nfits {CONFIG}\n" in printed
