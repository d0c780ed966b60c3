"""Evaluate with COCO's code on the ground truth that training would use."""

import contextlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import log_first_n

from instseg.data.dataset import DataSet


class GroundTruthEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator on the ground truth that training would use.

    Detectron2's own evaluator reads the file of the data set with pycocotools, which supports one
    encoding and no faults.  For a data set without a file it writes one.
    """

    def __init__(self, dataset: DataSet, **kwargs: Any) -> None:
        """
        Args:
            dataset: has classes.
            kwargs: see Detectron2.
        Raises:
            DatasetError: its classes have no names.
        """
        with _without_annotations(dataset.name):
            super().__init__(dataset.name, **kwargs)
        self._coco_api = dataset.coco
        self._do_evaluation = "annotations" in self._coco_api.dataset
        self._name = dataset.name

    def warn_of_limit(self, limit: int) -> None:
        """See :func:`warn_of_limit`."""
        annotations = self._coco_api.anns.values()
        crowds = ((entry["image_id"], bool(entry["iscrowd"])) for entry in annotations)
        warn_of_limit(self._name, crowds, limit)


@contextlib.contextmanager
def _without_annotations(dataset_name: str) -> Iterator[None]:
    """Let Detectron2 find an empty file for the data set."""
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "empty.json")
        file.write_text(json.dumps({"annotations": []}))
        metadata.__dict__["json_file"] = str(file)
        try:
            yield
        finally:
            del metadata.json_file
            if json_file is not None:
                metadata.json_file = json_file


def warn_of_limit(dataset_name: str, annotations: Iterable[tuple[Any, bool]], limit: int) -> None:
    """Warn once for a data set how many of its instances the limit of predictions leaves out.

    Args:
        annotations: image id of each annotation, and whether it is a crowd.
        limit: ``TEST.DETECTIONS_PER_IMAGE``.
    """
    counts = Counter(image_id for image_id, crowd in annotations if not crowd)
    above = [count for count in counts.values() if count > limit]
    if above:
        missed = sum(above) - limit * len(above)
        text = (
            f"data set {dataset_name}: {len(above)} images have more instances than "
            f"TEST.DETECTIONS_PER_IMAGE ({limit}) allows to find, so that {missed} of "
            f"{counts.total()} count as missed whatever the model finds; set "
            f"TEST.DETECTIONS_PER_IMAGE {max(above)}"
        )
        log_first_n(logging.WARNING, text, name=__name__, key="message")
