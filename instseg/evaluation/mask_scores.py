"""COCO evaluation of detections that have one score for their box and another for their mask."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from detectron2.evaluation import COCOEvaluator


class MaskScoreCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, ranking masks by ``mask_scores`` where there are any.

    Detections with that field (N,) are evaluated by it for ``segm`` and by ``scores`` for
    everything else.  In the written results each record then has ``mask_score`` beside ``score``.
    Without the field, numbers and files are those of Detectron2's evaluator.
    """

    _tasks: Sequence[str] | None

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take the results of a batch; see Detectron2."""
        for image, output in zip(inputs, outputs, strict=True):
            known = len(self._predictions)
            super().process([image], [output])
            instances = output.get("instances")
            if instances is None or not instances.has("mask_scores"):
                continue
            for prediction in self._predictions[known:]:
                scores = instances.mask_scores.tolist()
                for record, score in zip(prediction["instances"], scores, strict=True):
                    record["mask_score"] = score

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        """Evaluate one task after the other, masks first, so that the written file has ``score``.

        Every run gets copies, since Detectron2 replaces the class ids in the records.
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


def _ranked(record: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A copy of ``record`` whose ``score`` is the one for ``task``."""
    copy = dict(record)
    if task == "segm" and "mask_score" in record:
        copy["score"] = record["mask_score"]
    return copy
