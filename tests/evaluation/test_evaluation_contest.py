"""The contest metric against counts made by hand."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from instseg.evaluation.contest import THRESHOLDS, ContestEvaluator, image_scores, label_map
from tests.support.data_sets import data_set


def row(*runs: tuple[int, int]) -> np.ndarray:
    """(1, N) label map from (label, length) runs."""
    return np.concatenate([np.full(length, label) for label, length in runs])[None].astype(np.int32)


def test_an_exact_prediction_scores_one_at_every_threshold() -> None:
    ground_truth = row((0, 3), (1, 5), (2, 4))
    assert image_scores(ground_truth, ground_truth).tolist() == [1.0] * 10


def test_a_partial_overlap_counts_up_to_its_iou() -> None:
    # Instance of 10 pixels, prediction of 8 inside it: IoU 0.8, which is not above 0.8.
    scores = image_scores(row((1, 10)), row((1, 8), (0, 2)))
    assert dict(zip(THRESHOLDS, scores, strict=True)) == {t: float(t < 0.8) for t in THRESHOLDS}


def test_false_and_missing_instances_are_in_the_denominator() -> None:
    # One hit, one false positive, two misses: 1 / (1 + 1 + 2).
    ground_truth = row((1, 4), (2, 4), (3, 4), (0, 8))
    predicted = row((1, 4), (0, 8), (2, 4), (0, 4))
    assert image_scores(ground_truth, predicted)[0] == 1 / 4


def test_empty_images() -> None:
    nothing, something = row((0, 6)), row((0, 3), (1, 3))
    assert image_scores(nothing, nothing).tolist() == [1.0] * 10
    assert image_scores(nothing, something).tolist() == [0.0] * 10
    assert image_scores(something, nothing).tolist() == [0.0] * 10


def test_labels_with_gaps_count_as_the_same_instances() -> None:
    assert image_scores(row((7, 4), (0, 4)), row((3, 4), (0, 4))).tolist() == [1.0] * 10


labels = hnp.arrays(np.int32, (4, 6), elements=st.integers(0, 4))


@given(labels, labels)
def test_scores_equal_matching_by_loops(ground_truth: np.ndarray, predicted: np.ndarray) -> None:
    objects = [ground_truth == i for i in np.unique(ground_truth) if i]
    masks = [predicted == i for i in np.unique(predicted) if i]
    for threshold, score in zip(THRESHOLDS, image_scores(ground_truth, predicted), strict=True):
        hits = sum((o & m).sum() / (o | m).sum() > threshold for o in objects for m in masks)
        total = len(objects) + len(masks) - hits
        assert score == pytest.approx(hits / total if total else 1.0)


def test_overlapping_predictions_leave_each_pixel_to_the_better_score() -> None:
    masks = torch.tensor([[[1, 1, 1, 0]], [[0, 0, 1, 1]]], dtype=torch.bool)
    assert label_map(masks, torch.tensor([0.9, 0.8])).tolist() == [[2, 2, 2, 1]]
    assert label_map(masks, torch.tensor([0.7, 0.8])).tolist() == [[1, 1, 2, 2]]


def test_the_evaluator_averages_over_images_and_drops_low_scores() -> None:
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[:2] = 1
    annotation = {"segmentation": mask_util.encode(np.asfortranarray(mask))}
    records = [
        {"image_id": i, "height": 4, "width": 4, "annotations": [annotation]} for i in (1, 2)
    ]
    evaluator = ContestEvaluator(data_set(records), score_threshold=0.5)
    evaluator.reset()
    for image_id, score in ((1, 0.9), (2, 0.4)):
        instances = Instances((4, 4))
        instances.pred_masks = torch.from_numpy(mask[None].astype(bool))
        instances.scores = torch.tensor([score])
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 2.0]]))
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    result = evaluator.evaluate()
    assert result is not None
    assert result["contest"]["AP50"] == result["contest"]["AP"] == 50.0
