"""VOC's AP of masks, and the matching under it, against numbers worked out by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import instseg
from instseg.data.dataset import DataSet
from instseg.evaluation import build_evaluator
from instseg.evaluation.matching import HIT, MISS, UNCOUNTED, match
from instseg.evaluation.voc import VOCEvaluator, average_precision
from tests.support.data_sets import data_set

NAME = "voc_metric_test"
Row = tuple[int, int]
"""An instance in an image of one row: first pixel, and the one after the last."""


def matched(ious: list[list[float]], threshold: float, ignored: list[bool] | None = None) -> Any:
    array = np.array(ious, dtype=np.float64)
    flags = np.array(ignored or [False] * array.shape[1], dtype=bool)
    return match(array, flags, [threshold])[0].tolist()


def test_a_second_detection_of_an_instance_is_false() -> None:
    assert matched([[0.8], [0.9]], 0.5) == [HIT, MISS]


def test_a_detection_does_not_move_on_to_its_second_best_instance() -> None:
    """Both prefer the first instance; the second is over the threshold with the other as well."""
    assert matched([[0.9, 0.1], [0.8, 0.7]], 0.5) == [HIT, MISS]


def test_a_detection_under_the_threshold_leaves_the_instance_free() -> None:
    assert matched([[0.6], [0.8]], 0.7) == [MISS, HIT]


def test_an_overlap_equal_to_the_threshold_reaches_it() -> None:
    assert matched([[0.5]], 0.5) == [HIT]
    assert matched([[0.5]], float(np.nextafter(0.5, 1))) == [MISS]


def test_detections_of_an_ignored_instance_are_not_counted() -> None:
    ious = [[0.9, 0.0], [0.8, 0.0], [0.4, 0.3]]
    assert matched(ious, 0.5, [True, False]) == [UNCOUNTED, UNCOUNTED, MISS]


def test_nothing_to_match() -> None:
    assert match(np.zeros((2, 0)), np.zeros(0, dtype=bool), [0.5]).tolist() == [[MISS, MISS]]
    assert match(np.zeros((0, 2)), np.zeros(2, dtype=bool), [0.5, 0.7]).shape == (2, 0)


@given(
    hnp.arrays(np.float64, (5, 3), elements=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0])),
    hnp.arrays(np.bool_, 3),
)
def test_matching_equals_a_loop_over_detections(ious: np.ndarray, ignored: np.ndarray) -> None:
    for threshold, outcomes in zip((0.5, 0.7), match(ious, ignored, (0.5, 0.7)), strict=True):
        taken: set[int] = set()
        expected = []
        for row in ious.tolist():
            best = row.index(max(row))
            if row[best] < threshold:
                expected.append(MISS)
            elif ignored[best]:
                expected.append(UNCOUNTED)
            else:
                expected.append(MISS if best in taken else HIT)
                taken.add(best)
        assert outcomes.tolist() == expected


def precision_of(outcomes: list[int], num_instances: int, interpolation: str) -> float:
    return average_precision(np.array(outcomes, dtype=np.int8), num_instances, interpolation)


def test_both_interpolations_by_hand() -> None:
    """Precision 1, 1/2, 2/3 at the recalls 1/2, 1/2, 1; recall 0 to 1/2 has 1, the rest 2/3."""
    outcomes = [HIT, MISS, HIT]
    assert precision_of(outcomes, 2, "all-point") == pytest.approx((1 + 2 / 3) / 2)
    assert precision_of(outcomes, 2, "11-point") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_instances_that_are_never_found_lower_both() -> None:
    """One hit of four instances: recall 1/4 is beyond 0, 0.1, 0.2."""
    assert precision_of([HIT], 4, "all-point") == pytest.approx(1 / 4)
    assert precision_of([HIT], 4, "11-point") == pytest.approx(3 / 11)


def test_a_recall_of_three_in_ten_reaches_three_tenths() -> None:
    assert precision_of([HIT] * 3, 10, "11-point") == pytest.approx(4 / 11)


def test_precision_is_the_best_at_this_or_higher_recall() -> None:
    """Precision 0, 1/2, 2/3: at every recall 2/3."""
    assert precision_of([MISS, HIT, HIT], 2, "all-point") == pytest.approx(2 / 3)
    assert precision_of([MISS, HIT, HIT], 2, "11-point") == pytest.approx(2 / 3)


def test_ignored_detections_are_as_if_they_were_not_there() -> None:
    for interpolation in ("11-point", "all-point"):
        assert precision_of([UNCOUNTED, HIT, UNCOUNTED], 1, interpolation) == 1
        assert precision_of([], 3, interpolation) == precision_of([MISS], 3, interpolation) == 0
        assert math.isnan(precision_of([MISS], 0, interpolation))


def rle(row: Row) -> dict[str, Any]:
    mask = np.zeros((1, 20), dtype=np.uint8, order="F")
    mask[:, row[0] : row[1]] = 1
    return dict(mask_util.encode(mask))


@pytest.fixture
def dataset() -> DataSet:
    """Class "a": an instance in both images and a difficult one; "b": one; "c": none."""

    def item(kind: int, row: Row, **extra: Any) -> dict[str, Any]:
        box = [row[0], 0, row[1] - row[0], 1]
        common = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": kind}
        return {**common, "segmentation": rle(row), **extra}

    first = [item(0, (0, 10)), item(0, (10, 20), difficult=1), item(1, (0, 5))]
    records = [
        {"file_name": f"{i}.png", "image_id": i, "height": 1, "width": 20, "annotations": items}
        for i, items in enumerate([first, [item(0, (5, 15))]])
    ]
    return data_set(records, ("a", "b", "c"))


def detections(*items: tuple[int, Row, float]) -> dict[str, Instances]:
    masks = torch.zeros(len(items), 1, 20, dtype=torch.bool)
    for mask, (_, row, _) in zip(masks, items, strict=True):
        mask[:, row[0] : row[1]] = True
    return {
        "instances": Instances(
            (1, 20),
            pred_boxes=Boxes(torch.zeros(len(items), 4)),
            scores=torch.tensor([score for *_, score in items]),
            pred_classes=torch.tensor([kind for kind, *_ in items], dtype=torch.int64),
            pred_masks=masks,
        )
    }


FIRST = detections((0, (0, 10), 0.6), (0, (10, 20), 0.9), (1, (0, 10), 0.8), (2, (0, 5), 0.9))
SECOND = detections((0, (5, 11), 0.7), (0, (5, 15), 0.5))


def check(numbers: dict[str, float]) -> None:
    """Class "a": the difficult instance (score 0.9), the second one with IoU 0.6 (0.7), the first
    (0.6), the second again (0.5).

    At 0.5: hit, hit, miss of two instances; at 0.7: miss, hit, hit.  "b": IoU 0.5.
    """
    assert numbers["AP50-a"] == pytest.approx(100)
    assert numbers["AP70-a"] == pytest.approx(100 * 2 / 3)
    assert (numbers["AP50-b"], numbers["AP70-b"]) == pytest.approx((100, 0))
    assert math.isnan(numbers["AP50-c"]) and math.isnan(numbers["AP70-c"])
    assert (numbers["AP50"], numbers["AP70"]) == pytest.approx((100, 100 / 3))


@pytest.mark.parametrize("interpolation", ["11-point", "all-point"])
def test_the_evaluator_by_hand(dataset: DataSet, interpolation: str) -> None:
    evaluator = VOCEvaluator(dataset, interpolation=interpolation)
    evaluator.process([{"image_id": 0}, {"image_id": 1}], [FIRST, SECOND])
    result = evaluator.evaluate()
    assert result is not None
    check(result["voc_segm"])


def test_detections_of_all_processes_are_ranked_together(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluators = [VOCEvaluator(dataset, interpolation="11-point") for _ in range(2)]
    for image_id, (evaluator, output) in enumerate(zip(evaluators, (FIRST, SECOND), strict=True)):
        evaluator.process([{"image_id": image_id}], [output])
    other = evaluators[1]._num_instances, dict(evaluators[1]._detections)
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, other])
    result = evaluators[0].evaluate()
    assert result is not None
    check(result["voc_segm"])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluators[0].evaluate() is None


def test_masks_are_ranked_by_their_own_scores(dataset: DataSet) -> None:
    evaluator = VOCEvaluator(dataset, interpolation="all-point")
    output = detections((1, (0, 5), 0.9), (1, (12, 14), 0.8))
    output["instances"].mask_scores = torch.tensor([0.1, 0.2])
    evaluator.process([{"image_id": 0}], [output])
    result = evaluator.evaluate()
    assert result is not None
    assert result["voc_segm"]["AP50-b"] == pytest.approx(50)


def test_reset_forgets(dataset: DataSet) -> None:
    evaluator = VOCEvaluator(dataset, interpolation="11-point")
    evaluator.process([{"image_id": 1}], [detections((0, (0, 3), 0.9))])
    evaluator.reset()
    evaluator.process([{"image_id": 0}, {"image_id": 1}], [FIRST, SECOND])
    result = evaluator.evaluate()
    assert result is not None
    check(result["voc_segm"])


def test_the_configuration_asks_for_the_metric(dataset: DataSet, tmp_path: Path) -> None:
    keys = ["OUTPUT_DIR", str(tmp_path), "TEST.METRICS", ("coco", "voc")]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", keys)
    evaluator = build_evaluator(cfg, dataset)
    evaluator.reset()
    evaluator.process([{"image_id": 0}, {"image_id": 1}], [FIRST, SECOND])
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "segm", "voc_segm"]
    check(results["voc_segm"])
