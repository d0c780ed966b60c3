"""Shared by the tests of YOLACT and YOLACT++: networks filled as those of ``golden/yolact``."""

import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn
from torchvision.ops import box_iou

import instseg
from instseg.checkpoint import Checkpointer
from instseg.cli import main
from instseg.projects.yolact import (
    Detections,
    GroundTruth,
    LossSettings,
    Predictions,
    encode,
    match,
    to_corners,
)
from tests.conftest import GOLDEN, close

FOLDER = GOLDEN / "yolact"
CONFIGS = {
    "yolact_resnet50": "yolact/yolact_resnet50.yaml",
    "yolact_base": "yolact/yolact_base.yaml",
    "yolact_darknet53": "yolact/yolact_darknet53.yaml",
    "yolact_plus_resnet50": "yolact_plus/yolact_plus_resnet50.yaml",
    "yolact_edge_resnet50": "yolact_edge/yolact_edge_resnet50.yaml",
    "yolact_edge_vid_resnet50": "yolact_edge/yolact_edge_vid_resnet50.yaml",
}
# Limits that the README of the numbers suggests.
FEATURES, RAW, SCORES = 5e-4, 1e-3, 2e-4
# Pixels of a mask, and those among them that rounding may change.
AREAS = ("mask_area", "near_half_pixels")
# Networks for images of 64 pixels that run in milliseconds.
SMALL = [
    *("MODEL.DEVICE", "cpu", "INPUT.SQUARE_SIZE", 64, "MODEL.YOLACT.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.YOLACT.CHANNELS", 16, "MODEL.WEIGHTS", ""),
]


def loss_settings(**changes: Any) -> LossSettings:
    """The paper's settings."""
    settings = LossSettings(
        positive_iou=0.5,
        negative_iou=0.4,
        crowd_iou=0.7,
        negative_ratio=3,
        box_weight=1.5,
        class_weight=1.0,
        mask_weight=6.125,
        semantic_weight=1.0,
        max_masks=100,
    )
    return replace(settings, **changes)


@dataclass
class Case:
    """One network.

    Attributes:
        golden: the authors' numbers.
        model: ours, in evaluation mode.
        report: what the conversion printed.
        tensors: results by stage, of the golden image.
    """

    golden: Any
    model: nn.Module
    report: str
    tensors: dict[str, torch.Tensor]


def load(name: str) -> Any:
    return np.load(FOLDER / f"{name}.npz")


def meta(name: str) -> dict[str, Any]:
    """The settings with which the authors' code was run."""
    settings: dict[str, Any] = json.loads(str(load(name)["meta"]))
    return settings


SEED: int = meta("yolact_resnet50")["seed"]


def keys(name: str) -> dict[str, tuple[list[int], str]]:
    entries = json.loads((FOLDER / f"{name}.keys.json").read_text())
    return {key: (shape, dtype) for key, shape, dtype in entries}


def filled(weights: ModuleType, golden: Any, key: str, shape: Any) -> torch.Tensor:
    """A tensor by the rule in the README of the numbers."""
    value = weights.fill(key, shape, SEED)
    if f"scale/{key}" in golden:
        value = (value * np.float32(golden[f"scale/{key}"])).astype(value.dtype)
    if f"override/{key}" in golden:
        value = golden[f"override/{key}"]
    return torch.from_numpy(np.asarray(value))


def convert(name: str, weights: ModuleType, folder: Path, golden: Any = None) -> tuple[Any, str]:
    """The network of ``name`` with converted weights, and the report of the conversion."""
    golden = load(name) if golden is None else golden
    state = {k: filled(weights, golden, k, shape) for k, (shape, _) in keys(name).items()}
    torch.save(state, folder / "released.pth")
    target = folder / "ours.safetensors"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        paper = "yolact_edge" if name.startswith("yolact_edge") else "yolact"
        assert main(["convert", paper, str(folder / "released.pth"), str(target)]) == 0
    (folder / "released.pth").unlink()
    cfg = instseg.load_cfg(CONFIGS[name], ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    Checkpointer(model).load(str(target))
    target.unlink()
    return model, printed.getvalue()


def build_case(name: str, weights: ModuleType, folder: Path) -> Case:
    """Run a network on the golden image."""
    golden = load(name)
    model, report = convert(name, weights, folder, golden)
    image = weights.image(480, 640, SEED)[:, :, ::-1].transpose(2, 0, 1)
    with torch.no_grad():
        images = model.preprocess([{"image": torch.from_numpy(image.copy())}])
        outputs = model.backbone(images)
        levels = dict(zip(("C3", "C4", "C5"), (outputs[x] for x in model._levels), strict=True))
        pyramid = model.fpn(list(levels.values()))
        levels |= dict(zip(("P3", "P4", "P5", "P6", "P7"), pyramid, strict=True))
        loc, conf, mask, proto = model.heads(pyramid)
        segm = model.semantic(pyramid[0])
    tensors = {"x": images, "loc": loc, "conf": conf, "mask": mask, "proto": proto, "segm": segm}
    return Case(golden, model, report, tensors | levels)


def sums_agree(x: torch.Tensor, golden: Any, name: str, tolerance: float = 1e-5) -> None:
    """Compare a whole tensor with the sums of the authors'."""
    total, magnitude = x.double().sum().item(), x.double().abs().sum().item()
    expected = golden[f"{name}_abs"]
    assert abs(total - golden[f"{name}_sum"]) <= tolerance * expected
    assert abs(magnitude - expected) <= tolerance * expected


def level_sums_agree(x: torch.Tensor, golden: Any, name: str) -> None:
    """Compare every level of a head's (1, P, n) output with the sums of the authors'."""
    levels = x[0].split(np.diff(golden["raw/level_start"]).tolist())
    for i, level in enumerate(levels):
        sums = {f"x_{kind}": golden[f"{name}_level_{kind}"][i] for kind in ("sum", "abs")}
        sums_agree(level, sums, "x")


def pairs(
    boxes: torch.Tensor, classes: torch.Tensor, golden: Any, prefix: str, tolerance: float
) -> list[tuple[int, int]]:
    """(ours, theirs) of equal class and box."""
    theirs = torch.from_numpy(golden[f"{prefix}"]).float()
    far = (boxes[:, None].float() - theirs[None]).abs().amax(dim=2)
    labels = torch.from_numpy(golden[f"{prefix.rpartition('/')[0]}/class"])
    far[classes[:, None] != labels[None]] = torch.inf
    nearest = far.min(dim=0)
    return [(int(i), j) for j, i in enumerate(nearest.indices) if nearest.values[j] <= tolerance]


def masks_of(golden: Any, prefix: str = "post") -> torch.Tensor:
    """(N, height, width) bool."""
    size = [int(x) for x in golden[f"{prefix}/rle_size"]]
    rles = [{"size": size, "counts": bytes(x)} for x in golden[f"{prefix}/rle_counts"]]
    return torch.from_numpy(mask_util.decode(rles)).permute(2, 0, 1).bool()


def detections_agree(detections: Detections, golden: Any, prefix: str) -> None:
    """Compare the detections of one image that are left after suppression with the authors'."""
    expected = len(golden[f"{prefix}/score"])
    assert len(detections.scores) == expected
    same = pairs(detections.boxes, detections.classes, golden, f"{prefix}/box_rel", 1e-3)
    assert len(same) >= expected * 0.98
    ours, theirs = torch.tensor(same).T
    close(detections.scores[ours], golden[f"{prefix}/score"][theirs], SCORES)
    close(detections.coefficients[ours], golden[f"{prefix}/coef"][theirs], RAW)


def results_agree(instances: Instances, golden: Any, prefix: str = "post") -> tuple[Any, Any]:
    """Compare the results of one image with the authors'; return the rows of both that match.

    Boxes that miss the image, which the authors' evaluation skips, are not given.
    """
    boxes = golden[f"{prefix}/box"]
    visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    assert len(instances) == visible.sum()
    same = pairs(instances.pred_boxes.tensor, instances.pred_classes, golden, f"{prefix}/box", 1)
    assert len(same) >= visible.sum() - 2
    ours, theirs = torch.tensor(same).T
    close(instances.scores[ours], golden[f"{prefix}/score"][theirs], SCORES)
    masks, expected = instances.pred_masks[ours], masks_of(golden, prefix)[theirs]
    area, near = (torch.from_numpy(golden[f"{prefix}/{x}"])[theirs] for x in AREAS)
    # Of a small mask, the pixels that rounding may change are more than a hundredth.
    differing = ((masks ^ expected).sum(dim=(1, 2)) - near).clamp(min=0)
    union = (masks | expected).sum(dim=(1, 2))
    assert (1 - differing / union.clamp(min=1)).min() >= 0.99
    assert ((masks.sum(dim=(1, 2)) - area).abs() <= near).all()
    return ours, theirs


def ground_truths(golden: Any) -> list[GroundTruth]:
    """The instances of the two training images; crowds come last in the arrays."""
    result = []
    for i, crowds in enumerate(golden["gt/num_crowds"]):
        rows = torch.from_numpy(golden[f"gt{i}/boxes"])
        shape = golden[f"gt{i}/mask_shape"]
        bits = np.unpackbits(golden[f"gt{i}/mask_bits"])[: np.prod(shape)].reshape(shape)
        count = len(rows) - int(crowds)
        masks = torch.from_numpy(bits[:count]).float()
        result.append(
            GroundTruth(rows[:count, :4], rows[:count, 4].long(), masks, rows[count:, :4])
        )
    return result


def synthetic(weights: ModuleType, num_priors: int) -> Predictions:
    """The synthetic predictions of the README, leaves of a graph."""

    def unit(name: str, *shape: int) -> torch.Tensor:
        value = weights.fill(f"golden.{name}", shape, SEED)
        return torch.from_numpy(value * np.float32(np.sqrt(np.prod(shape[1:]))))

    logits = 1.5 * unit("conf", 2, num_priors, 81)
    logits[..., 0] += 4
    tensors = (
        0.5 * unit("loc", 2, num_priors, 4),
        logits,
        unit("mask", 2, num_priors, 32).tanh(),
        unit("proto", 2, 138, 138, 32).clamp(min=0),
        unit("segm", 2, 80, 69, 69),
    )
    return Predictions(*(x.requires_grad_() for x in tensors))


def matching_agrees(golden: Any, priors: torch.Tensor, image: int) -> None:
    """Compare the targets of the anchors of a training image with the authors'."""
    ground_truth, expected = ground_truths(golden)[image], f"match{image}"
    labels, matched = match(
        ground_truth.boxes, ground_truth.classes, ground_truth.crowd_boxes, priors
    )
    assert (labels.numpy() == golden[f"{expected}/conf_t"]).all()
    positive = (labels > 0).nonzero()[:, 0]
    assert positive.tolist() == golden[f"{expected}/pos_index"].tolist()
    assert (matched.numpy()[positive] == golden[f"{expected}/idx_t"][positive]).all()
    targets = encode(ground_truth.boxes[matched[positive]], priors[positive])
    close(targets, golden[f"{expected}/loc_t_pos"], 1e-4)
    best = box_iou(ground_truth.boxes, to_corners(priors)).max(dim=1)
    close(best.values, golden[f"{expected}/best_iou_per_gt"])
    assert best.indices.tolist() == golden[f"{expected}/best_prior_per_gt"].tolist()


def terms_agree(losses: dict[str, torch.Tensor], golden: Any, prefix: str, rel: float) -> None:
    """Compare every loss, and their sum, with the authors'."""
    terms = {"box": "B", "cls": "C", "mask": "M", "semantic": "S", "maskiou": "I"}
    values = {terms[name.removeprefix("loss_")]: loss.item() for name, loss in losses.items()}
    values["total"] = sum(values.values())
    for name, loss in values.items():
        assert loss == pytest.approx(float(golden[f"{prefix}/loss_{name}"]), rel=rel)


def gradients_agree(predictions: Predictions, golden: Any) -> None:
    """Compare the gradients of the synthetic predictions with the authors'."""
    tensors = {
        "loc": predictions.deltas,
        "conf": predictions.logits,
        "mask": predictions.coefficients,
        "proto": predictions.prototypes,
        "segm": predictions.semantic,
    }
    for name, x in tensors.items():
        total = float(golden[f"synthetic/{name}_sum"])
        assert x.double().sum().item() == pytest.approx(total, rel=1e-5)
        assert x.grad is not None
        sums_agree(x.grad, golden, f"synthetic/grad_{name}")
    logits, coefficients, prototypes = (tensors[x].grad for x in ("conf", "mask", "proto"))
    for i in (0, 1):
        used = logits[i].abs().sum(dim=1).nonzero()[:, 0]
        assert used.tolist() == golden[f"synthetic/conf_rows_used{i}"].tolist()
    rows = torch.from_numpy(golden["match0/pos_index"])
    close(coefficients[0, rows], golden["synthetic/grad_mask_pos0"], 1e-5)
    close(prototypes[0, ::6, ::6], golden["synthetic/grad_proto_sub"], 1e-5)


def image(height: int, width: int, seed: int) -> dict[str, Any]:
    """A noise image for a model."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height, "width": width}


def with_instances(item: dict[str, Any], count: int) -> dict[str, Any]:
    """``item`` with instances for training, all in one box, of classes 0, 1, ..."""
    size = item["image"].shape[1:]
    instances = Instances(tuple(size))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 28, 24]]).repeat(count, 1))
    instances.gt_classes = torch.arange(count)
    if count:
        masks = torch.zeros(count, *size, dtype=torch.bool)
        masks[:, 6:22, 6:26] = True
        instances.gt_masks = BitMasks(masks)
    return {**item, "instances": instances}
