"""Leaf metrics and mean IoU against numbers made by hand, and which data sets get which metric."""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import BoxMode, Instances

import instseg
from instseg.data.dataset import DataSet
from instseg.errors import ConfigError
from instseg.evaluation import build_evaluator
from instseg.evaluation.leaves import LeafEvaluator, symmetric_best_dice
from instseg.evaluation.semantic import SemanticEvaluator, semantic_map
from tests.support.data_sets import data_set

NAME = "dense_evaluation_test"


def row(*runs: tuple[int, int]) -> np.ndarray:
    """(1, N) label map from (label, length) runs."""
    return np.concatenate([np.full(length, label) for label, length in runs])[None].astype(np.int32)


def annotation(mask: np.ndarray, kind: int = 0, crowd: int = 0) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": rle,
        "bbox": mask_util.toBbox(rle).tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": kind,
        "iscrowd": crowd,
    }


def record(
    size: tuple[int, int], *annotations: dict[str, Any], image_id: int = 1
) -> dict[str, Any]:
    height, width = size
    return {
        "file_name": "none.png",
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": list(annotations),
    }


def instances(labels: np.ndarray, scores: list[float]) -> Instances:
    """One mask for each label 1, 2, ..."""
    result = Instances(labels.shape)
    result.pred_masks = torch.stack(
        [torch.from_numpy(labels == number) for number in range(1, len(scores) + 1)]
    )
    result.scores = torch.tensor(scores)
    result.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    return result


def test_best_dice_is_the_smaller_of_both_directions() -> None:
    # Truth 4 + 4 pixels; found: 4 of the first, 2 of the second, and 2 of the second again.
    # From the truth: (1 + 2 * 2 / (4 + 2)) / 2; from what was found: (1 + 2/3 + 2/3) / 3.
    ground_truth, predicted = row((1, 4), (2, 4)), row((1, 4), (2, 2), (3, 2))
    assert symmetric_best_dice(ground_truth, predicted) == pytest.approx(7 / 9)
    assert symmetric_best_dice(predicted, ground_truth) == pytest.approx(7 / 9)


def test_a_missed_leaf_lowers_best_dice_from_one_side_alone() -> None:
    assert symmetric_best_dice(row((1, 4), (2, 4)), row((1, 4), (0, 4))) == pytest.approx(0.5)


def test_best_dice_without_leaves() -> None:
    nothing, something = row((0, 6)), row((0, 3), (1, 3))
    assert symmetric_best_dice(nothing, nothing) == 1
    assert symmetric_best_dice(nothing, something) == 0
    assert symmetric_best_dice(something, nothing) == 0


def test_labels_with_gaps_are_the_same_leaves() -> None:
    assert symmetric_best_dice(row((7, 4), (0, 4)), row((3, 4), (0, 4))) == 1


def test_the_leaf_evaluator_counts_and_drops_low_scores() -> None:
    ground_truth = row((1, 4), (2, 4), (0, 4))
    leaves = data_set(
        [record((1, 12), annotation(ground_truth == 1), annotation(ground_truth == 2))]
    )
    evaluator = LeafEvaluator(leaves, score_threshold=0.5)
    evaluator.process(
        [{"image_id": 1}], [{"instances": instances(row((1, 4), (2, 8)), [0.9, 0.1])}]
    )
    result = evaluator.evaluate()
    assert result is not None
    # One leaf of two was found: best Dice 1/2, foreground 2 * 4 / (8 + 4), count 1 - 2.
    assert result["leaves"] == pytest.approx(
        {"SBD": 50.0, "FBD": 200 / 3, "DiC": -1.0, "|DiC|": 1.0}
    )
    evaluator.reset()
    assert np.isnan(evaluator.evaluate()["leaves"]["SBD"])  # type: ignore[index]


def test_differences_in_count_do_not_cancel() -> None:
    ground_truth = row((1, 4), (0, 4))
    leaves = data_set([record((1, 8), annotation(ground_truth == 1), image_id=i) for i in (1, 2)])
    evaluator = LeafEvaluator(leaves, score_threshold=0.5)
    for image, predicted in ((1, row((1, 2), (2, 2), (0, 4))), (2, row((0, 8)))):
        scores = [0.9] * max(int(predicted.max()), 1)
        evaluator.process([{"image_id": image}], [{"instances": instances(predicted, scores)}])
    result = evaluator.evaluate()
    assert result is not None
    assert (result["leaves"]["DiC"], result["leaves"]["|DiC|"]) == (0, 1)


def test_mean_iou_over_the_classes_that_occur() -> None:
    ground_truth = row((1, 4), (0, 4))
    evaluator = SemanticEvaluator(data_set([record((1, 8), annotation(ground_truth == 1))]))
    probabilities = torch.zeros(3, 1, 8)
    for label, pixels in ((1, slice(0, 3)), (2, slice(3, 4)), (0, slice(4, 8))):
        probabilities[label, 0, pixels] = 1
    evaluator.process([{"image_id": 1}], [{"sem_seg": probabilities}])
    result = evaluator.evaluate()
    assert result is not None
    # Background 4 / 4, class a 3 / 4; class b does not occur but its pixel is wrong.
    expected = {"mIoU": 87.5, "pACC": 87.5, "IoU-background": 100, "IoU-a": 75, "IoU-b": 0}
    assert result["sem_seg"] == pytest.approx(expected)


def test_crowds_are_not_counted_and_small_instances_are_on_top() -> None:
    full = np.ones((1, 6), dtype=bool)
    labels, counted = semantic_map(
        record(
            (1, 6),
            annotation(row((1, 1), (0, 5)) == 1, kind=1),
            annotation(row((1, 3), (0, 3)) == 1, kind=0),
            annotation(full, kind=0, crowd=1),
        )
    )
    assert labels.tolist() == [[2, 1, 1, 0, 0, 0]]
    assert counted.tolist() == [[True, True, True, False, False, False]]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({}, "gives no semantic map"),
        ({"sem_seg": torch.zeros(5, 1, 8)}, "has 5 channels; expected background and the 2"),
    ],
)
def test_a_model_without_the_right_semantic_map_is_refused(
    output: dict[str, Any], message: str
) -> None:
    evaluator = SemanticEvaluator(data_set([record((1, 8))]))
    with pytest.raises(ConfigError, match=message):
        evaluator.process([{"image_id": 1}], [output])


def kinds_of(dataset: DataSet, tmp_path: Path, *overrides: Any) -> set[str]:
    cfg = instseg.get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), *overrides])
    evaluator = build_evaluator(cfg, dataset)
    return {type(each).__name__ for each in getattr(evaluator, "_evaluators", [evaluator])}


@pytest.mark.parametrize(
    ("kind", "overrides", "extra"),
    [
        ("coco", (), set()),
        ("leaves", (), {"LeafEvaluator"}),
        ("coco", ("TEST.METRICS", ("coco", "leaves")), {"LeafEvaluator"}),
        ("coco", ("TEST.METRICS", ("semantic", "coco")), {"SemanticEvaluator"}),
    ],
)
def test_metrics_follow_the_data_set_and_the_configuration(
    tmp_path: Path, kind: str, overrides: Any, extra: set[str]
) -> None:
    full = annotation(np.ones((1, 8), dtype=bool))
    dataset = data_set([record((1, 8), full)], kind=kind)
    assert kinds_of(dataset, tmp_path, *overrides) == {"MaskScoreCOCOEvaluator", *extra}
