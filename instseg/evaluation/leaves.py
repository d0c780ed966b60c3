"""The metrics of the leaf segmentation challenge (CVPPP)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from instseg.data.dataset import DataSet
from instseg.data.readers.cvppp import EVALUATOR_TYPE
from instseg.evaluation.contest import common_pixels, label_map, true_label_map
from instseg.evaluation.matching import mask_ranking
from instseg.evaluation.registry import Metric, register

Labels = npt.NDArray[np.integer[Any]]


@register("leaves", kind=EVALUATOR_TYPE)
class LeafEvaluator(Metric, DatasetEvaluator):
    """Symmetric best Dice (SBD), difference in count (DiC, |DiC|) and Dice of the foreground (FBD).

    As in the challenge, leaves do not overlap: a pixel belongs to the predicted mask with the best
    score that covers it.  Results under ``leaves`` are means over the images; ``SBD`` and ``FBD``
    are in per cent, and ``DiC`` is the predicted minus the true count.  Classes are ignored.

    Source: Scharr et al., Machine Vision and Applications 2016, section 4.
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
        self._scores: list[tuple[float, float, int]] = []

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        """Names without ``DiC``, which is best at 0; ``|DiC|`` is best at its lowest."""
        return ["leaves/SBD", "leaves/FBD", "leaves/|DiC|"]

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
            self._scores.append(
                (
                    symmetric_best_dice(gt_labels, predicted),
                    symmetric_best_dice((gt_labels > 0).astype(int), (predicted > 0).astype(int)),
                    len(np.setdiff1d(predicted, [0])) - len(np.setdiff1d(gt_labels, [0])),
                )
            )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        gathered = comm.gather(self._scores, dst=0)
        if not comm.is_main_process():
            return None
        scores = np.array(list(itertools.chain.from_iterable(gathered)), dtype=float)
        dice, foreground, difference = scores.reshape(-1, 3).T
        means = {
            "SBD": 100 * dice,
            "FBD": 100 * foreground,
            "DiC": difference,
            "|DiC|": np.abs(difference),
        }
        return {
            "leaves": {
                name: float(per_image.mean()) if len(per_image) else float("nan")
                for name, per_image in means.items()
            }
        }


def symmetric_best_dice(gt_labels: Labels, predicted: Labels) -> float:
    """The smaller best Dice of two maps, from one to the other and back.

    The best Dice is the mean, over the leaves of one map, of the largest Dice with a leaf of the
    other; Dice of two leaves is 2 |A ∩ B| / (|A| + |B|).  It is 1 if no map has leaves, and 0 if
    only one map has.

    Args:
        gt_labels: (H, W) label map, 0 for background; labels need not be consecutive.
        predicted: as ``gt_labels``.
    """
    overlap = common_pixels(gt_labels, predicted)
    areas = overlap.sum(axis=1)[1:, None] + overlap.sum(axis=0)[None, 1:]
    dice = 2 * overlap[1:, 1:] / np.maximum(areas, 1)
    in_gt, in_predicted = overlap.sum(axis=1)[1:] > 0, overlap.sum(axis=0)[1:] > 0
    dice = dice[in_gt][:, in_predicted]
    if not dice.size:
        return float(not in_gt.any() and not in_predicted.any())
    return float(min(dice.max(axis=0).mean(), dice.max(axis=1).mean()))
