"""Every published configuration builds; one of each kind trains, evaluates and is reloaded."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

import instseg
from instseg.testing import assert_valid, batch_of, check_saving_of, check_training_on
from tests.conftest import ROOT
from tests.support.meta_models import meta_model
from tests.support.own_projects import PROJECTS

CONFIGS = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").rglob("*.yaml")
    if not path.name.startswith("Base-")
)
# Images small enough for a step in seconds; a score threshold low enough for detections.
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.MIN_SIZE_TEST", 96),
    *("INPUT.CROP.ENABLED", False, "INPUT.CROP.AROUND_INSTANCES", 0.0),
    *("INPUT.SQUARE_SIZE", 160),
    *("TEST.DETECTIONS_PER_IMAGE", 20),
    *(word for project in PROJECTS for word in project.any_score + project.fast),
]
# Trunks of few channels; on the meta device, every configuration is built with all of its own.
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 16, "MODEL.DARKNET.STEM_CHANNELS", 8),
]
# VGG has no number of channels to set.
FEWER_PIXELS = {"deepmask/deepmask_vgg_a_coco.yaml": ["MODEL.DEEPMASK.PATCH_SIZE", 96]}


def small_cfg(name: str) -> CfgNode:
    words = [*SMALL, *NARROW, *FEWER_PIXELS.get(name, ())]
    return instseg.load_cfg(ROOT / "configs" / name, words)


@pytest.fixture(scope="module")
def records(data_root: Path) -> list[dict[str, Any]]:
    """One real image with several instances and one that has none."""
    instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml")
    every = DatasetCatalog.get("coco_mini_train")
    full = next(r for r in every if sum(not a["iscrowd"] for a in r["annotations"]) >= 4)
    empty = next(r for r in every if not r["annotations"])
    return [full, empty]


def kind(name: str) -> tuple[str, ...]:
    """Values that configurations of other depth, classes, data set and schedule have in common."""
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
    parameters = list(meta_model(ROOT / "configs" / name).parameters())
    assert parameters and all(parameter.is_meta for parameter in parameters)


def test_a_config_trains_a_step_with_and_without_instances_evaluates_and_round_trips(
    stepped: str, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    cfg = small_cfg(stepped)
    model = check_training_on(cfg, records).eval()
    sample = batch_of(cfg, records[0], training=False)
    instances = check_saving_of(model, cfg, tmp_path, sample)
    assert_valid(instances, records[0]["height"], records[0]["width"], max_instances=len(instances))


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
