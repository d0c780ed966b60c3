"""The metric of the 2018 Data Science Bowl, which most papers on nuclei call "AP"."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from instseg.data.dataset import DataSet
from instseg.evaluation.matching import HIT, mask_ranking, match
from instseg.evaluation.registry import Metric, register
from instseg.masks import CroppedMasks, decode

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


@register("contest")
class ContestEvaluator(Metric, DatasetEvaluator):
    """TP / (TP + FP + FN) of masks at IoU 0.5 ... 0.95, averaged over the images.

    A prediction is a true positive if its IoU with a true instance is above the threshold.  As in
    the contest, predicted masks do not overlap: a pixel belongs to the mask with the best score
    that covers it (``mask_scores`` if a model gives them).  An image without instances and without
    predictions counts 1.  Classes are ignored.

    Source: Caicedo et al., Nature Methods 2019, "Evaluation metrics"; the same formula as in
    Schmidt et al., MICCAI 2018 (StarDist), section 3.
    """

    takes_cropped = True

    def __init__(self, dataset: DataSet, *, score_threshold: float) -> None:
        """
        Args:
            dataset: its instances have RLE or polygon masks.
            score_threshold: predictions with a lower score are ignored.
        """
        self._records = {record["image_id"]: record for record in dataset.records}
        self._score_threshold = score_threshold
        self._scores: list[np.ndarray] = []

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        return ["contest/AP", *(f"contest/{_name(threshold)}" for threshold in THRESHOLDS)]

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        return cls(dataset, score_threshold=cfg.TEST.CONTEST_SCORE_THRESH)

    def reset(self) -> None:
        self._scores = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            gt_labels = true_label_map(self._records[image["image_id"]])
            instances = output["instances"]
            counted = instances[instances.scores >= self._score_threshold]
            predicted = label_map(counted.pred_masks, mask_ranking(counted))
            self._scores.append(image_scores(gt_labels, predicted))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Per cent, like Detectron2's evaluators; ``AP`` is the mean over the thresholds."""
        gathered = comm.gather(self._scores, dst=0)
        if not comm.is_main_process():
            return None
        scores = list(itertools.chain.from_iterable(gathered))
        means = 100 * np.mean(scores, axis=0) if scores else np.full(len(THRESHOLDS), np.nan)
        result = {"AP": float(means.mean())}
        for threshold, mean in zip(THRESHOLDS, means, strict=True):
            result[_name(threshold)] = float(mean)
        return {"contest": result}


def _name(threshold: float) -> str:
    return f"AP{round(100 * threshold)}"


def true_label_map(record: Mapping[str, Any]) -> np.ndarray:
    """(H, W) int32 of a record: 0 for background, 1 ... N for instances, later ones on top."""
    size = record["height"], record["width"]
    labels = np.zeros(size, dtype=np.int32)
    for number, annotation in enumerate(record["annotations"], start=1):
        labels[decode(annotation["segmentation"], *size)] = number
    return labels


def label_map(masks: torch.Tensor | CroppedMasks, scores: torch.Tensor) -> np.ndarray:
    """(H, W) int32: 0 for background, 1 ... N for the mask with the best score on each pixel.

    Args:
        masks: (N, H, W) bool, or cropped.
        scores: (N,).
    """
    best_first = CroppedMasks.of(masks)[scores.argsort().flip(0)]
    ranks = best_first.to_label_image().astype(np.int32)
    return np.where(ranks > 0, len(best_first) + 1 - ranks, 0)


def common_pixels(gt_labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(T + 1, P + 1) number of pixels for each label of ``gt_labels`` and each of ``predicted``.

    Args:
        gt_labels, predicted: (H, W) integers 0 ... T and 0 ... P.
    """
    columns = int(predicted.max()) + 1
    pairs = gt_labels.ravel().astype(np.int64) * columns + predicted.ravel()
    counts = np.bincount(pairs, minlength=(int(gt_labels.max()) + 1) * columns)
    return counts.reshape(-1, columns)


def image_scores(gt_labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(10,) TP / (TP + FP + FN) of one image at ``THRESHOLDS``.

    Args:
        gt_labels, predicted: (H, W) label maps, 0 for background; labels need not be consecutive.
    """
    overlap = common_pixels(gt_labels, predicted)
    gt_areas, predicted_areas = overlap.sum(axis=1), overlap.sum(axis=0)
    inside = overlap[1:, 1:]
    union = gt_areas[1:, None] + predicted_areas[None, 1:] - inside
    iou = inside / np.maximum(union, 1)
    total = np.count_nonzero(gt_areas[1:]) + np.count_nonzero(predicted_areas[1:])
    # In the contest an IoU equal to the threshold does not count.
    above = [float(np.nextafter(threshold, 1)) for threshold in THRESHOLDS]
    # Labels do not overlap, so each instance has at most one prediction with an IoU above 0.5, and
    # the order of the predictions does not matter.
    outcomes = match(iou.T, np.zeros(len(iou), dtype=bool), above)
    true_positives = (outcomes == HIT).sum(axis=1)
    return np.where(total == 0, 1.0, true_positives / np.maximum(total - true_positives, 1))
