"""Every published configuration builds; one of each kind trains, evaluates and is reloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from torch import nn

import instseg
from instseg.checkpoint import Checkpointer
from instseg.config.classes import num_classes_key
from instseg.data.mappers import build_train_mapper
from instseg.data.samples import build_samples
from tests.conftest import ROOT

CONFIGS = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").rglob("*.yaml")
    if not path.name.startswith("Base-")
)
# Pictures small enough for a step in seconds; a score threshold low enough for detections.
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.MIN_SIZE_TEST", 96),
    *("INPUT.CROP.ENABLED", False),
    *("INPUT.SQUARE_SIZE", 160),
    *("TEST.DETECTIONS_PER_IMAGE", 20),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("MODEL.DEEPMASK.OCTAVES_TEST", "(0.0,)"),
    *("MODEL.INSTANCE_FCN.SCALES_TEST", "(48, 96)"),
    *("MODEL.SGN.MERGE_PARTNERS", 1),
    *("MODEL.YOLACT.SCORE_THRESH_TEST", 0.0),
]


def small_cfg(name: str) -> CfgNode:
    return instseg.load_cfg(ROOT / "configs" / name, SMALL)


@pytest.fixture(scope="module")
def records(data_root: Path) -> list[dict[str, Any]]:
    """One real picture with several objects and one that has none."""
    instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    every = DatasetCatalog.get("coco_mini_train")
    full = next(r for r in every if sum(not a["iscrowd"] for a in r["annotations"]) >= 4)
    empty = next(r for r in every if not r["annotations"])
    return [full, empty]


def train_batches(cfg: CfgNode, records: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A batch of each record; where a project draws samples, some of those, of every kind."""
    if not cfg.INPUT.SAMPLES:
        yield from (batch_of(cfg, record, training=True) for record in records)
        return
    samples = iter(build_samples(cfg, records, batch_size=2))
    for _ in range(4):
        yield [next(samples), next(samples)]


def batch_of(cfg: CfgNode, record: dict[str, Any], training: bool) -> list[dict[str, Any]]:
    if cfg.MODEL.LOAD_PROPOSALS:
        record = with_proposals(record)
    # To a mapper of videos a still picture is a clip of one frame.
    video = training and cfg.INPUT.VIDEO_REFERENCE
    mapper = build_train_mapper(cfg, augment=True) if video else DatasetMapper(cfg, training)
    sample = mapper(record)
    key = num_classes_key(cfg)
    if training and key is not None:
        node: Any = cfg
        for part in key.split("."):
            node = node[part]
        sample["instances"].gt_classes %= node
    return [sample]


def with_proposals(record: dict[str, Any]) -> dict[str, Any]:
    """The whole picture and its quarters, as read from a proposal file."""
    width, height = record["width"], record["height"]
    x, y = width / 2, height / 2
    corners = [[0, 0, width, height], [0, 0, x, y], [x, 0, width, y], [0, y, x, height]]
    return {
        **record,
        "proposal_boxes": np.array(corners, dtype=np.float32),
        "proposal_objectness_logits": np.zeros(len(corners), dtype=np.float32),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }


def kind(name: str) -> tuple[str, ...]:
    """What two configurations share that differ in depth, classes, data set and schedule."""
    cfg = small_cfg(name)
    nodes = [node for node in cfg.MODEL.values() if isinstance(node, CfgNode)]
    networks = [node.NETWORK for node in nodes if "NETWORK" in node]
    return Path(name).parent.name, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME, *networks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Has every configuration stepped, all but the last one of its kind as slow tests."""
    if "stepped" in metafunc.fixturenames:
        chosen = {kind(name): name for name in CONFIGS}.values()
        slow = pytest.mark.slow
        metafunc.parametrize(
            "stepped", [pytest.param(n, marks=() if n in chosen else slow) for n in CONFIGS]
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_can_be_built(name: str) -> None:
    """On the meta device, whose tensors have shapes and no numbers."""
    model = build_model(instseg.load_cfg(ROOT / "configs" / name, ["MODEL.DEVICE", "meta"]))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_config_trains_a_step_with_and_without_objects_evaluates_and_round_trips(
    stepped: str, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    cfg = small_cfg(stepped)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # without statistics 100 random layers overflow
            nn.init.constant_(module.weight, 0.5)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for batch in train_batches(cfg, records):
        model.zero_grad()
        with EventStorage(0):
            losses = model(batch)
        assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values()), losses
        sum(losses.values()).backward()
        without = [n for n, p in trainable.items() if p.grad is None]
        assert not without, f"no gradient reaches {without} for {batch[0]['file_name']}"

    model.eval()
    sample = batch_of(cfg, records[0], training=False)
    with torch.no_grad():
        before = model(sample)[0]["instances"]
        Checkpointer(model, str(tmp_path)).save("weights")
        other = build_model(cfg).eval()
        Checkpointer(other).load(str(tmp_path / "weights.pth"))
        after = other(sample)[0]["instances"]
    height, width = records[0]["height"], records[0]["width"]
    assert before.image_size == (height, width)
    assert before.pred_masks.shape == (len(before), height, width)
    assert before.pred_masks.dtype == torch.bool
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(before.get(field), after.get(field))
    assert torch.equal(before.pred_boxes.tensor, after.pred_boxes.tensor)


def test_a_config_states_differences_only() -> None:
    """A line that repeats what the base already says hides what the config is about."""
    assert [line for name in CONFIGS for line in repeated(name)] == []


def repeated(name: str) -> list[str]:
    path = ROOT / "configs" / name
    content = yaml.safe_load(path.read_text())
    bases = content.pop("_BASE_", [])
    base = instseg.get_cfg()
    for file in [bases] if isinstance(bases, str) else bases:
        base.merge_from_file(str(path.parent / file))

    def within(node: dict[str, Any], inherited: CfgNode, prefix: str) -> list[str]:
        lines = []
        for key, value in node.items():
            if isinstance(value, dict):
                lines += within(value, inherited[key], f"{prefix}{key}.")
            elif inherited._decode_cfg_value(value) == inherited[key]:
                lines.append(prefix + key)
        return lines

    return within(content, base, f"{name}: ")
