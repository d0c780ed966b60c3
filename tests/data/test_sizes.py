"""The largest instance of a training is measured, saved with the weights and found there again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import BoxMode

from instseg import Predictor
from instseg.checkpoint import Checkpointer
from instseg.data.sizes import largest_instance, saved_largest_instance
from tests.inference.test_predictor import tiny_cfg
from tests.support.data_sets import data_set


def record(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {"file_name": "a.png", "image_id": 1, "annotations": list(annotations)}


def annotation(
    box: list[float], mode: BoxMode = BoxMode.XYWH_ABS, crowd: int = 0
) -> dict[str, Any]:
    return {"bbox": box, "bbox_mode": mode, "iscrowd": crowd, "category_id": 0}


def test_it_is_the_longest_side_of_any_box_that_is_no_crowd() -> None:
    small = data_set([record(annotation([50, 50, 20, 30.2]), annotation([0, 0, 99, 9], crowd=1))])
    wide = data_set([record(), record(annotation([10, 50, 50, 60], BoxMode.XYXY_ABS))])
    assert largest_instance([small]) == 31
    assert largest_instance([small, wide]) == 40
    assert largest_instance([data_set([record()])]) is None


@pytest.mark.parametrize("value", [None, 0, -3, 2.5, "40", True, 2**40])
def test_anything_but_a_number_of_pixels_counts_as_unknown(value: Any) -> None:
    assert saved_largest_instance({"largest_instance": value}) is None
    assert saved_largest_instance({}) is None


def test_a_predictor_knows_what_its_weights_were_saved_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Predictor(tiny_cfg()).model
    Checkpointer(model, str(tmp_path), largest_instance=57).save("a")
    assert Predictor(tiny_cfg(), tmp_path / "a.pth").largest_instance == 57
    Checkpointer(model, str(tmp_path)).save("b")
    assert Predictor(tiny_cfg(), tmp_path / "b.pth").largest_instance is None
