"""COCO evaluation of detections with separate scores for box and mask."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from pycocotools.cocoeval import COCOeval
from scipy.stats import spearmanr
from torch import nn

from instseg.data.dataset import DataSet
from instseg.evaluation.fast_coco import FastCOCOEvaluator, require_fast
from instseg.evaluation.registry import Metric, register
from instseg.masks import CroppedMasks, as_text, ious
from instseg.modeling import gives_mask_scores


@register("coco")
class MaskScoreCOCOEvaluator(Metric, FastCOCOEvaluator):
    """Detectron2's COCO evaluator, which ranks masks by ``mask_scores`` if a model gives them.

    Detections with that field (N,) are ranked by it for ``segm`` and by ``scores`` for all other
    tasks, and their written results have both ``mask_score`` and ``score``.  Without the field,
    numbers and files are those of Detectron2's evaluator.

    ``segm`` also has ``rho``: how well the scores of masks predict their quality, see
    :func:`score_iou_correlation`.  With ``mask_scores`` there is also ``rho_by_score``, the same
    for ``scores``.
    """

    excludes = ("proposals",)
    takes_cropped = True
    _tasks: Sequence[str] | None

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        names = ["bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "bbox/APm", "bbox/APl"]
        if cfg.MODEL.MASK_ON:
            names += [name.replace("bbox", "segm") for name in names]
            names += ["segm/rho", "segm/rho_by_score"] if gives_mask_scores(model) else ["segm/rho"]
        if cfg.MODEL.KEYPOINT_ON:
            names += [f"keypoints/{key}" for key in ("AP", "AP50", "AP75", "APm", "APl")]
        tasks = dict.fromkeys(name.partition("/")[0] for name in names)
        if len(dataset.classes) > 1:
            names += [f"{task}/AP-{name}" for task in tasks for name in dataset.classes]
        return names

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        limit = max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
        fast = _is_fast(cfg)
        return cls(dataset, output_dir=folder, max_dets_per_image=limit, fast=fast)

    @classmethod
    def check(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> None:
        _is_fast(cfg)

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add the results of a batch; see Detectron2."""
        for image, output in zip(inputs, outputs, strict=True):
            num_before = len(self._predictions)
            instances = output.get("instances")
            if instances is None:
                super().process([image], [output])
                continue
            # Detectron2 would encode dense masks.
            fields = instances.get_fields()
            bare = Instances(instances.image_size, **fields)
            more: dict[str, list[Any]] = {}
            if "pred_masks" in fields:
                bare.remove("pred_masks")
                rles = CroppedMasks.of(instances.pred_masks).to_rle()
                more["segmentation"] = [as_text(rle) for rle in rles]
            if "mask_scores" in fields:
                more["mask_score"] = instances.mask_scores.tolist()
            super().process([image], [{**output, "instances": bare}])
            for prediction in self._predictions[num_before:]:
                for number, record in enumerate(prediction["instances"]):
                    record.update({key: values[number] for key, values in more.items()})

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        """Evaluate one task after the other; masks first, so that the last file has ``score``.

        Each task gets copies, since Detectron2 replaces the class ids in the records.
        """
        records = list(chain.from_iterable(p["instances"] for p in predictions))
        if not any("mask_score" in record for record in records):
            super()._eval_predictions(predictions, img_ids)
            return
        chosen = self._tasks
        tasks = set(chosen or self._tasks_from_predictions(records))
        try:
            for task in sorted(tasks, key=lambda name: name != "segm"):
                self._tasks = (task,)
                ranked = [_ranked(record, task) for record in records]
                super()._eval_predictions([{"instances": ranked}], img_ids)
        finally:
            self._tasks = chosen
        for task in sorted(self._results):
            self._results.move_to_end(task)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        results: dict[str, float] = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "segm" and coco_eval is not None:
            results["rho"] = 100 * score_iou_correlation(coco_eval)
            if any("class_score" in record for record in coco_eval.cocoDt.anns.values()):
                results["rho_by_score"] = 100 * score_iou_correlation(coco_eval, "class_score")
        return results


def score_iou_correlation(coco_eval: COCOeval, field: str = "score") -> float:
    """Spearman's rank correlation of the scores of masks with their true IoU.

    A mask counts if its box has an IoU of 0.5 or more with that of a true instance of its class;
    its true IoU is that with this instance.  (All other masks are left out: they are many, and
    would hide how well the rest are ranked.)  NaN for fewer than two masks, or if all scores or all
    IoUs are equal.

    Args:
        coco_eval: for ``segm``, after ``evaluate()``.
        field: of the detections, with the scores.
    """
    scores: list[float] = []
    true_ious: list[float] = []
    for key, mask_ious in coco_eval.ious.items():
        gt_annotations = coco_eval._gts[key]
        if not len(mask_ious):  # no detections, or no true instances of the class
            continue
        detections = sorted(coco_eval._dts[key], key=lambda record: -record["score"])
        detections = detections[: coco_eval.params.maxDets[-1]]
        boxes = np.array([record["bbox"] for record in detections])
        gt_boxes = np.array([record["bbox"] for record in gt_annotations])
        all_box_ious = ious(boxes, gt_boxes)
        rows = zip(detections, all_box_ious, mask_ious, strict=True)
        for record, detection_box_ious, detection_mask_ious in rows:
            nearest = detection_box_ious.argmax()
            if detection_box_ious[nearest] >= 0.5:
                scores.append(record[field])
                true_ious.append(detection_mask_ious[nearest])
    if len(set(scores)) < 2 or len(set(true_ious)) < 2:
        return float("nan")
    return float(spearmanr(scores, true_ious).statistic)


def _is_fast(cfg: CfgNode) -> bool:
    """Whether ``TEST.COCO_EVAL`` is "fast"; raises a ConfigError if its package is missing."""
    if cfg.TEST.COCO_EVAL == "fast":
        require_fast()
    return bool(cfg.TEST.COCO_EVAL == "fast")


def _ranked(record: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A copy of ``record`` with the score for ``task`` as ``score``."""
    copy = dict(record)
    if task == "segm" and "mask_score" in record:
        copy["score"], copy["class_score"] = record["mask_score"], record["score"]
    return copy
