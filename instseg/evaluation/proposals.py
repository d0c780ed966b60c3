"""Average recall of class-agnostic masks and boxes, the metric of proposals."""

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from instseg.data.build import check_masks
from instseg.data.dataset import DataSet
from instseg.evaluation.ground_truth import GroundTruthEvaluator
from instseg.evaluation.matching import mask_ranking
from instseg.evaluation.registry import Metric, register
from instseg.masks import CroppedMasks, ious, to_rle

logger = logging.getLogger(__name__)

Counts = npt.NDArray[np.int64]

LIMITS = (10, 100, 1000)
_AREAS = ("", "s", "m", "l")
"""COCOeval's default ``areaRng``: all, small < 32², medium < 96², large."""
_TASKS = {"proposals_box": "bbox", "proposals_segm": "segm"}
_NUM_THRESHOLDS = 10
_LEAST_IOU = 0.5
_STRICT = slice(5, None)
"""Thresholds 0.75 to 0.95."""
_NUM_STRICT = 5


@register("proposals")
class ProposalEvaluator(Metric, GroundTruthEvaluator):
    """AR@n and AUC of the masks and boxes of a class-agnostic model.

    Recall at an IoU threshold is the fraction of true instances, of any class, that the n best
    proposals of each image find; AR@n is its mean over the thresholds 0.5, 0.55 ... 0.95.
    Matching, crowds and areas are COCO's (``COCOeval`` with ``useCats`` off and up to 1000
    detections): in the order of their scores, detections take the free instance that they overlap
    most; crowds do not count.  ``ARs``, ``ARm``, ``ARl`` count only small, medium or large
    instances, by the area of the annotation's mask, for boxes too.  ``AR75@n`` is the mean over the
    thresholds 0.75 to 0.95, which separates sharp masks from roughly right ones.

    AUC is the area under AR@n over log10(n), from n = 1 to 1000, divided by 3 so that a perfect
    result has 100; AR is computed at every whole n and interpolated linearly.

    Results are in per cent under ``proposals_segm`` and ``proposals_box``; NaN if there are no
    instances to find.  Images that were not processed do not count.

    Each image is matched when it is processed, and only counts are stored and gathered from the
    other processes: 1000 proposals of 5000 images need no more memory than those of one.

    Source: Hosang et al., PAMI 2016, arXiv 1502.05082 (AR); Pinheiro et al., NIPS 2015, DeepMask,
    arXiv 1506.06204 (AR@n and AUC).
    Deviation: Hosang et al. integrate recall from 0.5 to 1; the thresholds here are COCO's.
    """

    takes_cropped = True

    def __init__(self, dataset: DataSet) -> None:
        """
        Args:
            dataset: all of its instances need a mask.
        Raises:
            DatasetError: instances have no mask.
        """
        super().__init__(dataset)
        images = self._coco_api.imgs.values()
        annotations = self._coco_api.imgToAnns
        check_masks(
            dataset.name,
            [
                {"file_name": image["file_name"], "annotations": annotations[image["id"]]}
                for image in images
            ],
        )
        self.reset()

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        return [f"{task}/{name}" for task in _TASKS for name in _Recalls().summary()]

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        return cls(dataset)

    def reset(self) -> None:
        self._counts = {task: _Recalls() for task in _TASKS}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            image_id = image["image_id"]
            best = _best(output["instances"])
            for task, iou_type in _TASKS.items():
                gt_annotations = self._coco_api.imgToAnns[image_id]
                proposals = _boxes(best) if iou_type == "bbox" else _masks(best)
                info = self._coco_api.imgs[image_id]
                self._counts[task].add(_evaluate(info, gt_annotations, proposals, iou_type))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """See the class; None on all processes except the main one."""
        gathered = comm.gather(self._counts, dst=0)
        if not comm.is_main_process():
            return None
        results = {}
        for task in _TASKS:
            total = _Recalls()
            for counts in gathered:
                total.merge(counts[task])
            results[task] = total.summary()
            logger.info("%s:\n%s", task, create_small_table(results[task]))
        return results


class _Recalls:
    """Sums over images.

    Attributes:
        hits: (4, 1000) instances found by the proposals of each rank, summed over the thresholds,
            for each of ``_AREAS``.
        strict_hits: (1000,) the same for instances of all areas, over the thresholds from 0.75.
        instances: (4,) instances to be found.
    """

    def __init__(self) -> None:
        self.hits: Counts = np.zeros((len(_AREAS), LIMITS[-1]), dtype=np.int64)
        self.strict_hits: Counts = np.zeros(LIMITS[-1], dtype=np.int64)
        self.instances: Counts = np.zeros(len(_AREAS), dtype=np.int64)

    def add(self, evaluated: Iterable[Mapping[str, Any] | None]) -> None:
        """Add the result of :func:`_evaluate`, one entry for each of ``_AREAS``."""
        for area, entry in enumerate(evaluated):
            if entry is None:  # neither instances nor proposals
                continue
            hits = (entry["dtMatches"] > 0) & ~entry["dtIgnore"]
            ranks = np.array(entry["dtIds"], dtype=np.int64) - 1
            self.hits[area, ranks] += hits.sum(axis=0)
            if _AREAS[area] == "":
                self.strict_hits[ranks] += hits[_STRICT].sum(axis=0)
            self.instances[area] += np.count_nonzero(entry["gtIgnore"] == 0)

    def merge(self, other: "_Recalls") -> None:
        self.hits += other.hits
        self.strict_hits += other.strict_hits
        self.instances += other.instances

    def summary(self) -> dict[str, float]:
        """Results in per cent: first AR of all areas, then the strict ones, then AUC."""
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: nothing to find
            recalls = self.hits.cumsum(axis=1) / (_NUM_THRESHOLDS * self.instances[:, None])
            strict = self.strict_hits.cumsum() / (_NUM_STRICT * self.instances[0])
        curves = dict(zip(_AREAS, 100 * recalls, strict=True))
        result = {
            f"AR{area}@{limit}": float(curve[limit - 1])
            for area, curve in curves.items()
            for limit in LIMITS
        }
        result |= {f"AR75@{limit}": float(100 * strict[limit - 1]) for limit in LIMITS}
        return {**result, **{f"AUC{area}": area_under(c) for area, c in curves.items()}}


def area_under(curve: npt.NDArray[np.float64]) -> float:
    """Mean height of ``curve`` over the logarithm of its position, by the trapezoidal rule.

    Args:
        curve: (N,) values at 1, 2 ... N.
    """
    steps = np.diff(np.log10(np.arange(1, len(curve) + 1)))
    return float((steps * (curve[1:] + curve[:-1]) / 2).sum() / steps.sum())


def _best(instances: Instances) -> Instances:
    """The proposals that count, best first."""
    order = mask_ranking(instances).argsort(descending=True, stable=True)[: LIMITS[-1]]
    return instances[order.to(instances.scores.device)]


def _boxes(instances: Instances) -> list[dict[str, Any]]:
    corners = instances.pred_boxes.tensor.cpu()
    boxes = BoxMode.convert(corners, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    return [{"bbox": box} for box in boxes.tolist()]


def _masks(instances: Instances) -> list[dict[str, Any]]:
    return [{"segmentation": rle} for rle in CroppedMasks.of(instances.pred_masks).to_rle()]


def _evaluate(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    proposals: Sequence[Mapping[str, Any]],
    iou_type: str,
) -> list[dict[str, Any] | None]:
    """``COCOeval.evalImgs`` of one image; the ids of proposals are their ranks from 1.

    Args:
        proposals: best first.
    """
    common = {"image_id": image["id"], "category_id": 1}
    # COCOeval writes into the annotations, and takes the id 0 for no match.
    gt_annotations = [{**item, **common, "id": i} for i, item in enumerate(annotations, start=1)]
    if iou_type == "segm":
        for item in gt_annotations:
            item["segmentation"] = to_rle(item["segmentation"], image["height"], image["width"])
    # The area of a proposal only affects precision.
    common["area"] = 0
    key = "bbox" if iou_type == "bbox" else "segmentation"
    near_proposals = [
        {**proposals[rank], **common, "id": rank + 1, "score": -rank}
        for rank in _near(proposals, gt_annotations, key)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by print
        evaluation = COCOeval(_coco(image, gt_annotations), _coco(image, near_proposals), iou_type)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [LIMITS[-1]]
        evaluation.evaluate()
    entries: list[dict[str, Any] | None] = evaluation.evalImgs
    return entries


def _near(
    proposals: Sequence[Mapping[str, Any]], gt_annotations: Sequence[Mapping[str, Any]], key: str
) -> list[int]:
    """Indices of the proposals that can match, since COCOeval takes a second for a thousand."""
    proposed, true = ([item[key] for item in side] for side in (proposals, gt_annotations))
    overlaps = ious(proposed, true, [int(item.get("iscrowd", 0)) for item in gt_annotations])
    near_indices: list[int] = np.flatnonzero(overlaps.max(axis=1, initial=0) >= _LEAST_IOU).tolist()
    return near_indices


def _coco(image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> COCO:
    api = COCO()
    api.dataset = {
        "images": [image],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    api.createIndex()
    return api
