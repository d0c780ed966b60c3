"""Masks are ranked by their own score, boxes by the class score."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

import instseg
from instseg.data.dataset import load
from instseg.evaluation import build_evaluator
from instseg.evaluation.mask_scores import MaskScoreCOCOEvaluator

RIGHT, WRONG = [10.0, 10, 30, 30], [50.0, 50, 60, 60]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """One image with one square, of the class with id 7."""
    square = {
        **{"id": 1, "image_id": 3, "category_id": 7, "iscrowd": 0, "area": 400},
        "bbox": [10, 10, 20, 20],
        "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]],
    }
    content = {
        "images": [{"id": 3, "file_name": "a.png", "height": 64, "width": 64}],
        "annotations": [square],
        "categories": [{"id": 7, "name": "square"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return f"coco:{tmp_path}/instances.json"


def evaluator_for(dataset: str, tmp_path: Path) -> COCOEvaluator:
    overrides = ["DATASETS.TEST", f"('{dataset}',)", "OUTPUT_DIR", str(tmp_path)]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", overrides)
    return build_evaluator(cfg, load(dataset))


def detections(**fields: torch.Tensor) -> dict[str, Instances]:
    """The instance itself with score 0.9 and a box beside it with 0.5."""
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, (RIGHT, WRONG), strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return {
        "instances": Instances(
            (64, 64),
            pred_boxes=Boxes(torch.tensor([RIGHT, WRONG])),
            scores=torch.tensor([0.9, 0.5]),
            pred_classes=torch.zeros(2, dtype=torch.int64),
            pred_masks=masks,
            **fields,
        )
    }


def evaluate(evaluator: COCOEvaluator, output: dict[str, Instances]) -> dict[str, dict]:
    evaluator.reset()
    evaluator.process([{"image_id": 3}], [output])
    return evaluator.evaluate()


def test_masks_are_ranked_by_mask_scores_and_boxes_by_scores(dataset: str, tmp_path: Path) -> None:
    """By mask score the wrong mask comes first: precision 1/2 at every recall."""
    output = detections(mask_scores=torch.tensor([0.1, 0.8]))
    results = evaluate(evaluator_for(dataset, tmp_path), output)
    assert list(results) == ["bbox", "segm"]
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(50)


def test_the_written_results_hold_both_scores(dataset: str, tmp_path: Path) -> None:
    output = detections(mask_scores=torch.tensor([0.1, 0.8]))
    evaluate(evaluator_for(dataset, tmp_path), output)
    (file,) = tmp_path.rglob("coco_instances_results.json")
    records = json.loads(file.read_text())
    scores = [(record["score"], record["mask_score"]) for record in records]
    assert scores == [pytest.approx((0.9, 0.1)), pytest.approx((0.5, 0.8))]
    assert {record["category_id"] for record in records} == {7}


def test_without_mask_scores_the_results_are_detectron2s(dataset: str, tmp_path: Path) -> None:
    ours = evaluator_for(dataset, tmp_path)
    assert isinstance(ours, MaskScoreCOCOEvaluator)
    theirs = COCOEvaluator(dataset, output_dir=str(tmp_path / "theirs"))
    expected = evaluate(theirs, detections())
    results = evaluate(ours, detections())
    del results["segm"]["rho"]  # which Detectron2 does not know
    assert str(results) == str(expected)  # as text, since areas without instances give NaN
    files = sorted(tmp_path.rglob("coco_instances_results.json"))
    assert files[0].read_text() == files[1].read_text()


def rho_of(evaluator: COCOEvaluator, *boxes: tuple[list[float], float]) -> float:
    """Results for masks that fill these boxes and have these mask scores."""
    return segm_of(evaluator, [0.5] * len(boxes), *boxes)["rho"]


def segm_of(
    evaluator: COCOEvaluator, scores: list[float], *boxes: tuple[list[float], float]
) -> dict[str, float]:
    """Results for masks that fill these boxes and have these mask scores beside ``scores``."""
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
    for mask, ((x1, y1, x2, y2), _) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    instances = Instances(
        (64, 64),
        pred_boxes=Boxes(torch.tensor([box for box, _ in boxes])),
        scores=torch.tensor(scores),
        mask_scores=torch.tensor([score for _, score in boxes]),
        pred_classes=torch.zeros(len(boxes), dtype=torch.int64),
        pred_masks=masks,
    )
    return evaluate(evaluator, {"instances": instances})["segm"]


GOOD, FAIR = [10.0, 10, 30, 29], [10.0, 10, 30, 26]  # IoU 0.95 and 0.8 with the instance


def test_rho_is_the_rank_correlation_of_mask_scores_and_true_iou(
    dataset: str, tmp_path: Path
) -> None:
    evaluator = evaluator_for(dataset, tmp_path)
    assert rho_of(evaluator, (RIGHT, 0.9), (GOOD, 0.8), (FAIR, 0.7)) == pytest.approx(100)
    assert rho_of(evaluator, (RIGHT, 0.7), (GOOD, 0.8), (FAIR, 0.9)) == pytest.approx(-100)
    assert rho_of(evaluator, (RIGHT, 0.8), (GOOD, 0.9), (FAIR, 0.7)) == pytest.approx(50)
    assert math.isnan(rho_of(evaluator, (RIGHT, 0.8), (GOOD, 0.8)))


def test_rho_by_score_is_that_of_the_class_scores(dataset: str, tmp_path: Path) -> None:
    evaluator = evaluator_for(dataset, tmp_path)
    boxes = (RIGHT, 0.9), (GOOD, 0.8), (FAIR, 0.7)
    results = segm_of(evaluator, [0.1, 0.2, 0.3], *boxes)
    assert (results["rho"], results["rho_by_score"]) == pytest.approx((100, -100))


def test_rho_leaves_out_masks_beside_any_instance(dataset: str, tmp_path: Path) -> None:
    evaluator = evaluator_for(dataset, tmp_path)
    beside = (WRONG, 1.0)
    assert rho_of(evaluator, (RIGHT, 0.9), (FAIR, 0.7), beside) == pytest.approx(100)
    assert math.isnan(rho_of(evaluator, (RIGHT, 0.9), beside))
