"""COCO's metrics computed by faster-coco-eval, an optional package, with pycocotools' results."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from instseg.errors import ConfigError
from instseg.evaluation.ground_truth import GroundTruthEvaluator
from instseg.optional import require

logger = logging.getLogger(__name__)


def require_fast() -> None:
    """Raise a ConfigError if the package is missing."""
    require("faster_coco_eval", "fast-eval", "TEST.COCO_EVAL fast")


class FastCOCOEvaluator(GroundTruthEvaluator):
    """Detectron2's COCO evaluator, whose metrics faster-coco-eval can compute."""

    def __init__(self, *args: Any, fast: bool = False, **kwargs: Any) -> None:
        """
        Args:
            fast: whether faster-coco-eval computes the metrics.  It must be installed.
            args, kwargs: see :class:`GroundTruthEvaluator`.
        """
        super().__init__(*args, **kwargs)
        self._fast = fast

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[Any] | None = None
    ) -> None:
        """Fill ``self._results``, and write the results as Detectron2 does.

        Raises:
            ConfigError: a prediction has a class that the data set does not have.
        """
        records = list(chain.from_iterable(prediction["instances"] for prediction in predictions))
        ids = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", None)
        if ids is not None:
            self._check_classes(records, len(ids))
        if not self._fast or not self._do_evaluation:
            super()._eval_predictions(predictions, img_ids)
            return
        if ids is not None:
            category_ids = {number: category for category, number in ids.items()}
            for record in records:
                record["category_id"] = category_ids[record["category_id"]]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(records))
        for task in sorted(self._tasks or self._tasks_from_predictions(records)):
            limits = self._max_dets_per_image
            scored = score(self._coco_api, records, task, limits, img_ids) if records else None
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(scored, task, class_names=names)

    def _check_classes(self, records: Sequence[Mapping[str, Any]], count: int) -> None:
        unknown = {record["category_id"] for record in records}.difference(range(count))
        if unknown:
            raise ConfigError(
                f"a prediction has the class number {min(unknown)}; expected less than {count}, "
                f"the number of classes of {self._name}: evaluate a model of as many classes"
            )


def score(
    coco: COCO,
    records: Sequence[Mapping[str, Any]],
    task: str,
    limits: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[Any] | None = None,
) -> Any:
    """Metrics of results, as an evaluated ``COCOeval``.

    It has what pycocotools' has: ``stats``, ``eval``, ``ious``, ``params``, ``cocoDt``, ``_gts``
    and ``_dts``.  Its images and categories are numbered from 1 in the order of their ids, since
    the package takes whole numbers only.

    Args:
        coco: the ground truth, not changed.
        records: one or more results in COCO's form, not changed.
        task: "bbox" or "segm".
        limits: numbers of detections per image, the last for AP.
        image_ids: those to evaluate on; None is all.
    """
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    images = {name: number for number, name in enumerate(sorted(coco.imgs), start=1)}
    categories = {name: number for number, name in enumerate(sorted(coco.cats), start=1)}

    def renumbered(entry: Mapping[str, Any]) -> dict[str, Any]:
        image, category = images[entry["image_id"]], categories[entry["category_id"]]
        return {**entry, "image_id": image, "category_id": category}

    gt_coco = FastCOCO(
        {
            "images": [{**coco.imgs[name], "id": number} for name, number in images.items()],
            "categories": [{**coco.cats[name], "id": n} for name, n in categories.items()],
            "annotations": [renumbered(entry) for entry in coco.dataset["annotations"]],
        }
    )
    detections = [renumbered(record) for record in records]
    if task == "segm":
        for detection in detections:  # else the area would be that of the box
            detection.pop("bbox", None)
    evaluation = COCOeval_faster(
        gt_coco, gt_coco.loadRes(detections), task, print_function=logger.info
    )
    evaluation.params.maxDets = list(limits)
    if image_ids is not None:
        evaluation.params.imgIds = [images[name] for name in image_ids]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    evaluation._gts = _by_image_and_category(gt_coco.dataset["annotations"])
    evaluation._dts = _by_image_and_category(detections)
    return evaluation


def _by_image_and_category(entries: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[Any]]:
    groups: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for entry in entries:
        groups[entry["image_id"], entry["category_id"]].append(entry)
    return groups
