"""The instances that predictions are compared with, as COCO's code needs them."""

import contextlib
import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import log_first_n
from pycocotools.coco import COCO

from instseg.data.findings import Report
from instseg.data.images import MAX_PIXELS
from instseg.data.readers.coco_check import check_coco, usable_polygons
from instseg.data.readers.coco_records import read_coco
from instseg.data.readers.json_files import file_of
from instseg.errors import DatasetError
from instseg.masks import rle_area


class TruthEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator on the ground truth that training would see.

    Detectron2's own has pycocotools read the file of the data set, which knows one encoding and no
    faults, and writes a file for a data set without one.
    """

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        """
        Args:
            dataset_name: a registered data set.
            kwargs: see Detectron2.
        Raises:
            DatasetError: see :func:`ground_truth`.
        """
        with _without_annotations(dataset_name):
            super().__init__(dataset_name, **kwargs)
        self._coco_api = ground_truth(dataset_name)
        self._do_evaluation = "annotations" in self._coco_api.dataset
        self._name = dataset_name

    def warn_of_limit(self, limit: int) -> None:
        """See :func:`warn_of_limit`."""
        annotations = self._coco_api.anns.values()
        crowds = ((entry["image_id"], bool(entry["iscrowd"])) for entry in annotations)
        warn_of_limit(self._name, crowds, limit)


@contextlib.contextmanager
def _without_annotations(dataset_name: str) -> Iterator[None]:
    """Has Detectron2 find an empty file for the data set."""
    metadata = MetadataCatalog.get(dataset_name)
    own = metadata.get("json_file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "empty.json")
        file.write_text(json.dumps({"annotations": []}))
        metadata.__dict__["json_file"] = str(file)
        try:
            yield
        finally:
            del metadata.json_file
            if own is not None:
                metadata.json_file = own


def ground_truth(dataset_name: str) -> COCO:
    """What pycocotools compares predictions with: of the file of the data set, or of its records.

    Raises:
        DatasetError: the file cannot be read, or classes have no names.
    """
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    if json_file is None and not metadata.get("thing_classes"):
        raise DatasetError(
            f"data set {dataset_name} has no class names; set them with "
            f"MetadataCatalog.get({dataset_name!r}).thing_classes = ['cat', 'dog']"
        )
    coco = COCO()
    if json_file is None:
        coco.dataset = convert_to_coco_dict(dataset_name)
    else:
        where = file_of(dataset_name, json_file)
        coco.dataset = read_coco(where, json_file, metadata.get("image_root") or "")
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    prepare_truth(coco)
    return coco


def warn_of_limit(dataset_name: str, annotations: Iterable[tuple[Any, bool]], limit: int) -> None:
    """Say once for a data set how many of its instances no prediction can find.

    Args:
        annotations: id of the image and whether it is a crowd, of each.
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


def prepare_truth(coco: COCO) -> None:
    """Leave out of ``coco`` what training leaves out, and complete the rest, in place.

    pycocotools fails or reads beyond its memory where an object cannot be drawn, fails where one
    has no ``area`` or ``iscrowd``, ignores one with an impossible area, and counts the object whose
    id is 0 as never found: objects are numbered from 1.
    """
    if "annotations" not in coco.dataset:
        return
    left_out = Report(check_coco(coco.dataset, masks=False)).left_out()
    kept = [entry for entry in coco.dataset["annotations"] if entry["id"] not in left_out]
    for number, entry in enumerate(kept, start=1):
        entry["id"] = number
        entry.setdefault("iscrowd", 0)
        if isinstance(entry.get("segmentation"), list):
            entry["segmentation"] = usable_polygons(entry["segmentation"])
        area = entry.get("area")
        # pycocotools leaves objects of any other area out of every range, and so of the result.
        if type(area) not in (int, float) or not 0 < area <= MAX_PIXELS:
            *_, width, height = entry.get("bbox") or (0, 0, 0, 0)
            mask = entry.get("segmentation")
            entry["area"] = float(rle_area(coco.annToRLE(entry))) if mask else float(width * height)
    coco.dataset["annotations"] = kept
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
