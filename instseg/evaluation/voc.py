"""PASCAL VOC's average precision of masks: AP^r, or mAP^r over the classes."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from torch import nn

from instseg.data.build import check_masks
from instseg.data.dataset import DataSet
from instseg.data.readers.voc import EVALUATOR_TYPE
from instseg.evaluation.matching import HIT, UNCOUNTED, mask_ranking, match
from instseg.evaluation.registry import Metric, register
from instseg.masks import RLE, CroppedMasks, ious, to_rle

logger = logging.getLogger(__name__)

THRESHOLDS = (0.5, 0.7)
_KEYS = [f"AP{round(100 * threshold)}" for threshold in THRESHOLDS]

Outcomes = npt.NDArray[np.int8]
Detection = tuple[float, Outcomes]
"""Score, and (2,) the outcome at each of ``THRESHOLDS``."""


@register("voc", kind=EVALUATOR_TYPE)
class VOCEvaluator(Metric, DatasetEvaluator):
    """AP of masks at IoU 0.5 and 0.7, mean over the classes that have instances.

    Each detection goes to the true instance of its class that it overlaps most.  It is a hit if
    their IoU reaches the threshold and no detection with a better score took the instance.
    Instances marked ``difficult`` or ``iscrowd`` do not count, nor do the detections that go to
    them.

    Results are in per cent under ``voc_segm``: ``AP50`` and ``AP70``, and the same for each class
    (``AP50-NAME``); NaN for a class without instances.  Images that were not processed do not
    count.  Only scores and outcomes are stored, not masks.

    Source: Hariharan et al., ECCV 2014 (SDS), section 4 (AP^r); development kits of VOC 2007 and
    2010 for the two interpolations.
    """

    excludes = ("proposals",)
    takes_cropped = True

    def __init__(self, dataset: DataSet, *, interpolation: str) -> None:
        """
        Args:
            dataset: has classes, and its instances have masks.
            interpolation: see :func:`average_precision`.
        Raises:
            DatasetError: instances have no mask.
        """
        check_masks(dataset.name, dataset.records)
        self._records = {record["image_id"]: record for record in dataset.records}
        self._classes = dataset.classes
        self._interpolation = interpolation
        self.reset()

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        class_keys = [f"{key}-{name}" for name in dataset.classes for key in _KEYS]
        return [f"voc_segm/{key}" for key in (*_KEYS, *class_keys)]

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        return cls(dataset, interpolation=cfg.TEST.VOC_INTERPOLATION)

    def reset(self) -> None:
        self._num_instances = np.zeros(len(self._classes), dtype=np.int64)
        self._detections: dict[int, list[Detection]] = defaultdict(list)

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            record = self._records[image["image_id"]]
            instances = output["instances"]
            classes = instances.pred_classes.cpu()
            present = {item["category_id"] for item in record["annotations"]}
            for kind in sorted(present | set(classes.tolist())):
                annotations = [a for a in record["annotations"] if a["category_id"] == kind]
                ignored = np.array(
                    [bool(a.get("iscrowd") or a.get("difficult")) for a in annotations], dtype=bool
                )
                self._num_instances[kind] += np.count_nonzero(~ignored)
                size = record["height"], record["width"]
                gt_rles = [to_rle(item["segmentation"], *size) for item in annotations]
                predicted = instances[(classes == kind).to(instances.pred_classes.device)]
                self._detections[kind] += _matched(predicted, gt_rles, ignored)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """See the class; None on all processes except the main one."""
        gathered = comm.gather((self._num_instances, dict(self._detections)), dst=0)
        if not comm.is_main_process():
            return None
        numbers = np.sum([num_instances for num_instances, _ in gathered], axis=0)
        precisions = np.array(
            [
                self._class_precisions(
                    list(itertools.chain.from_iterable(d.get(kind, []) for _, d in gathered)),
                    int(number),
                )
                for kind, number in enumerate(numbers)
            ]
        ).reshape(-1, len(THRESHOLDS))
        defined = precisions[numbers > 0]
        means = defined.mean(axis=0) if len(defined) else np.full(len(THRESHOLDS), np.nan)
        result = {key: float(mean) for key, mean in zip(_KEYS, means, strict=True)}
        logger.info("voc_segm (%s):\n%s", self._interpolation, create_small_table(result))
        for name, values in zip(self._classes, precisions, strict=True):
            for key, value in zip(_KEYS, values, strict=True):
                result[f"{key}-{name}"] = float(value)
        return {"voc_segm": result}

    def _class_precisions(self, detections: list[Detection], num_instances: int) -> list[float]:
        """AP of one class at each of ``THRESHOLDS``, in per cent."""
        scores = np.array([score for score, _ in detections])
        order = np.argsort(-scores, kind="stable")
        outcomes = np.array([row for _, row in detections], dtype=np.int8)
        outcomes = outcomes.reshape(-1, len(THRESHOLDS))[order]
        return [
            100 * average_precision(column, num_instances, self._interpolation)
            for column in outcomes.T
        ]


def average_precision(outcomes: Outcomes, num_instances: int, interpolation: str) -> float:
    """Area under the curve of interpolated precision over recall.

    The interpolated precision at a recall is the best one at this or any higher recall.

    Args:
        outcomes: (D,) of ``HIT``, ``MISS``, ``UNCOUNTED`` for all detections of a class, best score
            first.
        num_instances: true instances of the class, without ignored ones.
        interpolation: ``"11-point"``: mean of the precision at the recalls 0, 0.1 ... 1;
            ``"all-point"``: the exact area.
    Returns:
        0 to 1; NaN without instances.
    Deviation: the recalls 0.1 ... 1 are compared exactly; the development kits round, so 3 of 10
    may count as less than 0.3.
    """
    if not num_instances:
        return float("nan")
    counted = outcomes[outcomes != UNCOUNTED]
    hits = np.cumsum(counted == HIT)
    precision = hits / np.arange(1, len(counted) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "11-point":
        # First detection with hits / num_objects >= step / 10, if there is one.
        first = np.searchsorted(10 * hits, np.arange(11) * num_instances)
        return float(best[first[first < len(best)]].sum() / 11)
    return float(best[counted == HIT].sum() / num_instances)


def _matched(
    predicted: Instances, gt_rles: list[RLE], ignored: npt.NDArray[np.bool_]
) -> list[Detection]:
    """Outcomes of the detections of one class in one image."""
    scores, order = torch.sort(mask_ranking(predicted), descending=True, stable=True)
    masks = CroppedMasks.of(predicted.pred_masks)[order]
    outcomes = match(ious(masks.to_rle(), gt_rles), ignored, THRESHOLDS)
    return list(zip(scores.tolist(), outcomes.T, strict=True))
