"""The metric of Cityscapes: what its scripts get to read, and when it is refused."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from PIL import Image

import instseg
from instseg.errors import ConfigError
from instseg.evaluation import build_evaluator
from instseg.evaluation.cityscapes import CityscapesEvaluator
from instseg.masks import CroppedMasks
from tests.support.data_sets import data_set

CITYSCAPES = replace(data_set([], kind="cityscapes_instance"), name="a set of Cityscapes")
MASKS = np.zeros((3, 5, 8), dtype=bool)
MASKS[0, 1:4, 2:6] = MASKS[1, :, 7] = True  # the third is empty


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The part of the authors' package that numbers the classes."""
    folder = tmp_path / "cityscapesscripts" / "helpers"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py"):
        file.touch()
    (folder / "labels.py").write_text(
        "from types import SimpleNamespace as Label\n"
        "name2label = {'a': Label(id=26), 'b': Label(id=33)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    MetadataCatalog.get(CITYSCAPES.name).thing_classes = ["a", "b"]
    yield
    MetadataCatalog.pop(CITYSCAPES.name)
    for name in [name for name in sys.modules if name.startswith("cityscapesscripts")]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", [torch.clone, CroppedMasks.of])
def test_the_scripts_read_a_line_and_a_dense_mask_of_each_instance(
    scripts: None, kind: Any
) -> None:
    evaluator = build_evaluator(instseg.get_cfg(), CITYSCAPES)
    assert isinstance(evaluator, CityscapesEvaluator)
    evaluator.reset()
    instances = Instances((5, 8), scores=torch.tensor([0.75, 0.5, 0.25]))
    instances.pred_classes = torch.tensor([1, 0, 0])
    instances.pred_masks = kind(torch.from_numpy(MASKS))
    evaluator.process([{"file_name": "aachen/1.png"}], [{"instances": instances}])
    folder = Path(evaluator._temp_dir)
    lines = [line.split() for line in (folder / "1_pred.txt").read_text().splitlines()]
    assert [(number, score) for _, number, score in lines] == [
        ("33", "0.75"),
        ("26", "0.5"),
        ("26", "0.25"),
    ]
    for (name, *_), mask in zip(lines, MASKS, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / name)) > 0, mask)
    evaluator._working_dir.cleanup()


def test_its_metrics_can_be_the_best(scripts: None) -> None:
    cfg = instseg.get_cfg()
    assert CityscapesEvaluator.measures(cfg, CITYSCAPES, torch.nn.Identity()) == [
        "segm/AP",
        "segm/AP50",
    ]


def test_another_set_is_not_measured_so() -> None:
    cfg = instseg.get_cfg()
    cfg.TEST.METRICS = ("cityscapes",)
    with pytest.raises(ConfigError, match="has cityscapes, but test is no set of Cityscapes; leav"):
        build_evaluator(cfg, data_set([]))


def test_without_its_scripts_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install cityscapesscripts"):
        build_evaluator(instseg.get_cfg(), CITYSCAPES)
