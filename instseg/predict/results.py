"""What ``instseg predict`` does with a result, of pictures and videos alike."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from pycocotools import mask as mask_util
from tqdm import tqdm

from instseg.data.images import Array
from instseg.engine.predictor import Predictor
from instseg.errors import ImageError, OutputError
from instseg.visualize import class_name, draw_instances

AddRecords = Callable[[Iterable[dict[str, Any]]], None]


@dataclass
class Results:
    """Chooses, draws and describes the objects found, and counts the inputs that failed.

    Attributes:
        predictor: whose results they are.
        output: folder of everything that is written.
        confidence: objects with a lower score are left out.
        overlay: whether pictures with the objects drawn on them are wanted.
        instance_masks: write a black and white PNG per object.
        failures: number of inputs that could not be used.
    """

    predictor: Predictor
    output: Path
    confidence: float
    overlay: bool
    instance_masks: bool
    failures: int = 0

    def __post_init__(self) -> None:
        self._category_ids = _category_ids(self.predictor)

    def fail(self, error: ImageError) -> None:
        """Count an input that could not be used, and say why in one line on stderr."""
        self.failures += 1
        tqdm.write(" ".join(str(error).split("\n")), file=sys.stderr)

    def keep(self, instances: Instances) -> Instances:
        """The objects that are sure enough, on the CPU."""
        return instances[instances.scores >= self.confidence].to("cpu")

    def draw(self, image: Array, instances: Instances) -> Array:
        """A copy of ``image`` (H, W, 3) in BGR order with ``instances`` on it."""
        return draw_instances(image, instances, self.predictor.class_names)

    def describe(self, instances: Instances, stem: str, prefix: str = "") -> list[dict[str, Any]]:
        """Records of objects: category, box, score and mask, in COCO's form.

        Args:
            instances: what :meth:`keep` left.
            stem: of the input's files; with ``instance_masks`` those of ``STEM_masks/`` are
                written.
            prefix: of the names of these files.
        Returns:
            one JSON object per instance.
        """
        records = []
        for index in range(len(instances)):
            number = int(instances.pred_classes[index])
            left, top, right, bottom = instances.pred_boxes.tensor[index].tolist()
            record: dict[str, Any] = {
                "category_id": self._category_ids.get(number, number),
                "category_name": class_name(self.predictor.class_names, number),
                "bbox": [left, top, right - left, bottom - top],
                "score": float(instances.scores[index]),
            }
            if instances.has("pred_masks"):
                # One at a time: all masks of a large picture as bytes in Fortran order would double
                # the memory.
                mask = np.asfortranarray(instances.pred_masks[index].numpy(), dtype=np.uint8)
                rle = mask_util.encode(mask)
                record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
                if self.instance_masks:
                    name = re.sub(r"[^\w-]+", "_", record["category_name"])
                    self._write_mask(mask, stem, f"{prefix}{index:03d}_{name}.png")
            records.append(record)
        return records

    def _write_mask(self, mask: Array, stem: str, name: str) -> None:
        folder = self.output / f"{stem}_masks"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        write_picture(folder / name, mask * 255)


@contextmanager
def json_list(path: Path) -> Iterator[AddRecords]:
    """A JSON list in the file ``path``, written as it grows and closed also after an interrupt.

    Yields:
        the function that appends records and hands them to the operating system.
    """
    separator = "\n"

    def add(records: Iterable[dict[str, Any]]) -> None:
        nonlocal separator
        with writing(path):
            for record in records:
                # One write for separator and record, so that an interrupt finds whole elements.
                file.write(separator + json.dumps(record))
                separator = ",\n"
            file.flush()

    with writing(path):
        file = path.open("w", encoding="utf-8")
    try:
        file.write("[")
        yield add
    finally:
        with writing(path), file:
            file.write("\n]\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors while ``path`` is written into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def write_picture(path: Path, image: Array) -> None:
    """Write a picture, (H, W, 3) in BGR order or (H, W), in the format of the file's extension.

    Raises:
        OutputError: the disk is full, or the like.
    """
    # cv2.imwrite would only return False on a full disk, and fails on non-ASCII paths under
    # Windows.
    ok, encoded = cv2.imencode(path.suffix, image)
    if not ok:
        raise OutputError(f"{path} cannot be written: OpenCV cannot encode it")
    with writing(path):
        path.write_bytes(encoded.tobytes())


def _category_ids(predictor: Predictor) -> dict[int, int]:
    """Class number -> category id of the data set, empty where it is of other classes."""
    names = predictor.cfg.DATASETS.TEST
    if not names or names[0] not in MetadataCatalog:
        return {}
    metadata = MetadataCatalog.get(names[0])
    if metadata.get("thing_classes") != predictor.class_names:
        return {}
    mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {number: category_id for category_id, number in mapping.items()}
