"""COCO's metric of a list of results, and the hits, misses and confusions behind it.

All matching is done by COCO's code: an instance is hit by the best-scored detection that reaches
the IoU and has no better free instance.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from instseg.masks import ious, rle_area

Record = dict[str, Any]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

AREAS = ("all", "small", "medium", "large")
"""COCO's ranges of the area of an instance: all, below 32², below 96², above."""
IOU = 0.5
"""Of the detections that count as hits, wherever a single IoU is meant."""
CROWDING = (0.0, 0.1, 0.3)
"""Upper limits of the first groups of crowding, see :func:`crowding`."""


@dataclass(frozen=True)
class Outcomes:
    """Which detections hit and which instances were hit, at IoU 0.5 within each class.

    Crowds, and detections that match them, are left out.

    Attributes:
        detections: (D,) numbers of the detections in the list of results.
        detection_classes, instance_classes: (D,), (G,) class numbers.
        detection_images, instance_images: (D,), (G,) numbers of the images.
        scores: (D,) of the detections.
        is_hit: (D,) bool.
        instances: (G,) ids of the instances in the ground truth.
        hit_scores: (G,) score of the detection that hits an instance, -inf for none.
        recalled: (T, G) bool, whether any detection hits it at each of COCO's IoU thresholds.
    """

    detections: Integers
    detection_classes: Integers
    detection_images: Integers
    scores: Floats
    is_hit: npt.NDArray[np.bool_]
    instances: Integers
    instance_classes: Integers
    instance_images: Integers
    hit_scores: Floats
    recalled: npt.NDArray[np.bool_]

    def of_class(self, number: int) -> tuple[Floats, npt.NDArray[np.bool_], int]:
        """Scores and hits of the detections of a class, and how many instances it has."""
        chosen = self.detection_classes == number
        count = int(np.count_nonzero(self.instance_classes == number))
        return self.scores[chosen], self.is_hit[chosen], count


@dataclass(frozen=True)
class Operating:
    """Precision and recall of the detections with some score or more.

    Attributes:
        score: the lowest that counts.
        hits, false_alarms, misses: numbers of detections, detections and instances.
    """

    score: float
    hits: int
    false_alarms: int
    misses: int

    @property
    def precision(self) -> float:
        """Part of the detections that hit; NaN without detections."""
        return _ratio(self.hits, self.hits + self.false_alarms)

    @property
    def recall(self) -> float:
        """Part of the instances that are hit; NaN without instances."""
        return _ratio(self.hits, self.hits + self.misses)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN without detections and instances."""
        return _ratio(2 * self.hits, 2 * self.hits + self.false_alarms + self.misses)


@dataclass(frozen=True)
class TaskResult:
    """COCO's metric of one task, in per cent; NaN where there is no instance.

    Attributes:
        task: "segm" or "bbox".
        classes: names, by class number.
        thresholds: the T values of IoU, 0.5 to 0.95.
        precision: (T, R, K, A) at R recalls for K classes and the A areas of :data:`AREAS`; -1
            where there is no instance.
        recall: (T, K, A), likewise.
        outcomes: at IoU 0.5.
        areas: (G,) of the instances in ``outcomes``.
    """

    task: str
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    precision: Floats
    recall: Floats
    outcomes: Outcomes
    areas: Floats

    def ap(
        self, *, iou: float | None = None, area: str = "all", number: int | None = None
    ) -> float:
        """Average precision.

        Args:
            iou: one of ``thresholds``; None for their mean.
            area: of :data:`AREAS`.
            number: of a class; None for the mean of all.
        """
        values = self.precision[..., AREAS.index(area)]
        values = values if iou is None else values[self.thresholds.index(iou)][None]
        return _mean(values if number is None else values[..., number])

    def ar(self, *, area: str = "all", number: int | None = None) -> float:
        """Average recall of all detections over all IoU thresholds; see :meth:`ap`."""
        values = self.recall[..., AREAS.index(area)]
        return _mean(values if number is None else values[..., number])

    def curve(self, iou: float | None, number: int | None = None) -> Floats:
        """(R,) precision at recalls of 0 to 1, not in per cent; NaN without instances.

        Args:
            iou, number: see :meth:`ap`.
        """
        values = self.precision[..., 0]
        values = values if iou is None else values[self.thresholds.index(iou)][None]
        values = values if number is None else values[..., number : number + 1]
        known = values.max(axis=(0, 1)) > -1
        if not known.any():
            return np.full(values.shape[1], np.nan)
        curve: Floats = values[..., known].mean(axis=(0, 2))
        return curve

    def at(self, score: float, number: int | None = None) -> Operating:
        """Precision and recall at a score.

        Args:
            score: the lowest that counts.
            number: of a class; None for the detections and instances of all.
        """
        scores, is_hit, count = self._of(number)
        hits = int(np.count_nonzero(is_hit & (scores >= score)))
        false_alarms = int(np.count_nonzero(~is_hit & (scores >= score)))
        return Operating(score, hits, false_alarms, count - hits)

    def best(self, number: int | None = None) -> Operating | None:
        """Where F1 is best, at the highest such score; None without a hit.

        Args:
            number: see :meth:`at`.
        """
        scores, is_hit, count = self._of(number)
        if not is_hit.any():
            return None
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum(is_hit[order])
        last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of equal scores
        f1 = 2 * hits[last] / (last + 1 + count)
        return self.at(float(scores[order][last[f1.argmax()]]), number)

    def num_instances(self, *, area: str = "all", number: int | None = None) -> int:
        """Number of instances; see :meth:`ap`."""
        low, high = Params(iouType=self.task).areaRng[AREAS.index(area)]
        chosen = (self.areas >= low) & (self.areas <= high)
        if number is not None:
            chosen &= self.outcomes.instance_classes == number
        return int(np.count_nonzero(chosen))

    def _of(self, number: int | None) -> tuple[Floats, npt.NDArray[np.bool_], int]:
        if number is not None:
            return self.outcomes.of_class(number)
        return self.outcomes.scores, self.outcomes.is_hit, len(self.outcomes.instances)


def evaluate_task(gt: COCO, results: Sequence[Record], task: str, limit: int) -> TaskResult:
    """COCO's metric of results.

    Args:
        gt: the ground truth, prepared as that of a :class:`~instseg.data.dataset.DataSet`.
        results: ``image_id``, ``category_id`` and ``score``, which the ground truth has, and for
            "segm" ``segmentation``, a compressed RLE, for "bbox" ``bbox``: x, y, width, height.
            They are not modified.
        task: "segm" or "bbox".
        limit: of the detections per image and class that count, the best first.
    """
    evaluation = _evaluated(gt, _of_task(results, task), task, limit, per_class=True)
    outcomes = _outcomes(evaluation, results)
    with _quiet():
        evaluation.accumulate()
    names = {entry["id"]: str(entry["name"]) for entry in gt.dataset["categories"]}
    return TaskResult(
        task=task,
        classes=tuple(names[key] for key in evaluation.params.catIds),
        thresholds=tuple(evaluation.params.iouThrs.round(2).tolist()),
        precision=evaluation.eval["precision"][..., 0],
        recall=evaluation.eval["recall"][..., 0],
        outcomes=outcomes,
        areas=np.array([gt.anns[key]["area"] for key in outcomes.instances.tolist()], float),
    )


def within_limit(results: Iterable[Record], limit: int) -> list[Record]:
    """The best ``limit`` results of each image and class, in the order of the list."""
    groups: dict[tuple[Any, Any], list[tuple[float, int]]] = {}
    listed = list(results)
    for number, record in enumerate(listed):
        pair = record["image_id"], record["category_id"]
        groups.setdefault(pair, []).append((-record["score"], number))
    chosen = sorted(number for group in groups.values() for _, number in sorted(group)[:limit])
    return [listed[number] for number in chosen]


def confusion(gt: COCO, results: Sequence[Record], task: str, score: float) -> Integers:
    """(K + 1, K + 1) numbers of instances of each class that were taken for each class.

    Detections match instances at IoU 0.5 whatever their classes are.  The last row is of false
    alarms, the last column of misses.  Crowds, and detections that match them, are left out.

    Args:
        gt, results, task: see :func:`evaluate_task`.
        score: detections with a lower score are left out.
    """
    counted = [record for record in results if record["score"] >= score]
    per_image = Counter(record["image_id"] for record in counted)
    limit = max(per_image.values(), default=1)
    evaluation = _evaluated(gt, _of_task(counted, task), task, limit, per_class=False)
    numbers = {key: number for number, key in enumerate(sorted(gt.cats))}
    background = len(numbers)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image in filter(None, evaluation.evalImgs):
        gt_classes = {key: numbers[gt.anns[key]["category_id"]] for key in image["gtIds"]}
        for key, match, ignored in zip(
            image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True
        ):
            if not ignored:
                row = gt_classes[int(match)] if match else background
                counts[row, numbers[counted[key - 1]["category_id"]]] += 1
        for key, match, ignored in zip(
            image["gtIds"], image["gtMatches"][0], image["gtIgnore"], strict=True
        ):
            counts[gt_classes[key], background] += not (ignored or match)
    return counts


def crowding(gt: COCO, instances: Integers) -> Floats:
    """(G,) largest IoU of the box of each instance with that of another one in its image.

    The other one can be of any class; crowds do not count.  0 for an instance that is alone.

    Args:
        gt: the ground truth.
        instances: (G,) ids of annotations that are no crowds, each once.
    """
    annotations = [gt.anns[key] for key in instances.tolist()]
    indices = sorted(range(len(annotations)), key=lambda index: str(annotations[index]["image_id"]))
    largest = np.zeros(len(annotations))
    for _, group in groupby(indices, key=lambda index: annotations[index]["image_id"]):
        members = list(group)
        boxes = [annotations[index]["bbox"] for index in members]
        overlaps = ious(boxes, boxes)
        np.fill_diagonal(overlaps, 0)
        largest[members] = overlaps.max(axis=1)
    return largest


def _evaluated(
    gt: COCO, annotations: list[Record], task: str, limit: int, *, per_class: bool
) -> COCOeval:
    """The evaluation of COCO's code after ``evaluate()``; the ids of detections count from 1.

    Args:
        per_class: match detections to instances of their class, at every IoU; otherwise to any
            instance at :data:`IOU`.
    """
    detections = COCO()
    parts: Mapping[str, Any] = {key: gt.dataset[key] for key in ("images", "categories")}
    detections.dataset = {**parts, "annotations": annotations}
    with _quiet():
        detections.createIndex()
        evaluation = COCOeval(gt, detections, task)
        evaluation.params.maxDets = [limit]
        if not per_class:
            evaluation.params.useCats = 0
            evaluation.params.iouThrs = np.array([IOU])
            evaluation.params.areaRng = evaluation.params.areaRng[:1]
            evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
    return evaluation


def _of_task(results: Iterable[Record], task: str) -> list[Record]:
    """Annotations of detections for COCO's code, which writes into them.

    The area of a mask is that of its pixels.  pycocotools' ``loadRes`` would take the box of
    results with boxes and masks, which changes the results by size.
    """
    key = "segmentation" if task == "segm" else "bbox"
    annotations = []
    for number, record in enumerate(results, start=1):
        shape = record[key]
        area = rle_area(shape) if task == "segm" else float(shape[2] * shape[3])
        fields = {name: record[name] for name in ("image_id", "category_id", "score", key)}
        annotations.append(fields | {"id": number, "area": area, "iscrowd": 0})
    return annotations


def _outcomes(evaluation: COCOeval, results: Sequence[Record]) -> Outcomes:
    params = evaluation.params
    images = {key: number for number, key in enumerate(params.imgIds)}
    classes = {key: number for number, key in enumerate(params.catIds)}
    detections, instances, recalled = [], [], [np.zeros((len(params.iouThrs), 0), bool)]
    for image in _of_all_areas(evaluation):
        pair = images[image["image_id"]], classes[image["category_id"]]
        counts = ~image["dtIgnore"][0].astype(bool)
        hits = image["dtMatches"][0] > 0
        for index in np.flatnonzero(counts).tolist():
            score = float(image["dtScores"][index])
            detections.append((image["dtIds"][index] - 1, *pair, score, hits[index]))
        real = np.flatnonzero(np.asarray(image["gtIgnore"]) == 0)
        for index in real.tolist():
            match = int(image["gtMatches"][0, index])
            score = float(results[match - 1]["score"]) if match else -np.inf
            instances.append((image["gtIds"][index], *pair, score))
        recalled.append(image["gtMatches"][:, real] > 0)
    of_detections = np.array(detections, dtype=float).reshape(-1, 5).T
    of_instances = np.array(instances, dtype=float).reshape(-1, 4).T
    return Outcomes(
        detections=of_detections[0].astype(np.int64),
        detection_images=of_detections[1].astype(np.int64),
        detection_classes=of_detections[2].astype(np.int64),
        scores=of_detections[3],
        is_hit=of_detections[4].astype(bool),
        instances=of_instances[0].astype(np.int64),
        instance_images=of_instances[1].astype(np.int64),
        instance_classes=of_instances[2].astype(np.int64),
        hit_scores=of_instances[3],
        recalled=np.concatenate(recalled, axis=1),
    )


def _of_all_areas(evaluation: COCOeval) -> Iterable[Mapping[str, Any]]:
    """Matches of each image and class with instances of any size."""
    every = evaluation.params.areaRng[0]
    return (image for image in evaluation.evalImgs if image and image["aRng"] == every)


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())  # pycocotools prints


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _mean(values: Floats) -> float:
    """Per cent; COCO's code writes -1 where there is no instance."""
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else float("nan")
