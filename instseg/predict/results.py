"""How ``instseg predict`` chooses, draws and describes results, of images and videos alike."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from instseg.data.images import Array
from instseg.errors import ImageError
from instseg.inference.predictor import Predictor
from instseg.masks import CroppedMasks, as_text, polygons, rle_area
from instseg.predict.records import write_image, writing
from instseg.visualize import OverlayStyle, at_least, draw_instances

_LONGEST_NAME = 50
"""Characters of a class name in the name of a file, of at most 4 bytes each."""
_FURTHER_SCORES = {"class_scores": "class_score", "mask_scores": "mask_score"}
"""Optional field of instances → key of records."""


@dataclass
class Results:
    """Chooses, draws and describes predicted instances, and counts the inputs that failed.

    Attributes:
        predictor: gives the results.
        output: folder of everything that is written.
        confidence: instances with a lower score are left out.
        overlay: write images with the instances drawn on them.
        instance_masks: write a black and white PNG per instance.
        rank_by_mask: the score of an instance is its ``mask_scores``, not its ``scores``.
        polygons: describe masks by polygons.
        style: of the overlays.
        failures: number of inputs that could not be used.
    """

    predictor: Predictor
    output: Path
    confidence: float
    overlay: bool
    instance_masks: bool
    rank_by_mask: bool = False
    polygons: bool = False
    style: OverlayStyle = OverlayStyle()
    failures: int = 0

    def fail(self, error: ImageError) -> None:
        """Count an input that could not be used, and say why in one line on stderr."""
        self.failures += 1
        tqdm.write(" ".join(str(error).split("\n")), file=sys.stderr)

    def categories(self) -> list[dict[str, Any]]:
        """Ids and names of the classes, in their order."""
        return self.predictor.categories.as_coco()

    def keep(self, instances: Instances) -> Instances:
        """The instances whose score is high enough, on the CPU, best first."""
        if self.rank_by_mask:
            if not instances.has("mask_scores"):  # of an image that resizing leaves no pixel of
                instances.mask_scores = instances.scores
            return _ranked_by_mask(instances, self.confidence).to("cpu")
        return at_least(instances, self.confidence).to("cpu")

    def draw(self, image: Array, instances: Instances) -> Array:
        """A copy of ``image`` (H, W, 3) in BGR order with ``instances`` on it."""
        names = self.predictor.categories.names
        return draw_instances(image, instances, names, style=self.style)

    def describe(self, instances: Instances, stem: str, prefix: str = "") -> list[dict[str, Any]]:
        """Records of instances: category, box, area, scores and mask, in COCO's form.

        Args:
            instances: those that :meth:`keep` gave.
            stem: of the input's files; ``instance_masks`` are written to ``STEM_masks/``.
            prefix: of the names of these files.
        Returns:
            one JSON object per instance.
        """
        records = []
        masks = CroppedMasks.of(instances.pred_masks) if instances.has("pred_masks") else None
        rles = [] if masks is None else masks.to_rle()
        for index in range(len(instances)):
            number = int(instances.pred_classes[index])
            left, top, right, bottom = instances.pred_boxes.tensor[index].tolist()
            record: dict[str, Any] = {
                "category_id": self.predictor.categories.id_of(number),
                "category_name": self.predictor.categories.name_of(number),
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "score": float(instances.scores[index]),
            }
            for field, key in _FURTHER_SCORES.items():
                if instances.has(field):
                    record[key] = float(instances.get(field)[index])
            if masks is not None:
                rle = rles[index]
                record["area"], record["segmentation"] = rle_area(rle), as_text(rle)
                if self.polygons:
                    outer = [part.outer.ravel().tolist() for part in polygons(*masks.crop(index))]
                    record["segmentation"] = outer or record["segmentation"]
                if self.instance_masks:
                    name = re.sub(r"[^\w-]+", "_", record["category_name"])[:_LONGEST_NAME]
                    mask = masks[index].to_label_image().astype(np.uint8)
                    self._write_mask(mask, stem, f"{prefix}{index:03d}_{name}.png")
            records.append(record)
        return records

    def restore(self, records: Sequence[dict[str, Any]], height: int, width: int) -> Instances:
        """The instances that :meth:`describe` turned into ``records``.

        Args:
            records: all of an image, with or without masks.
            height, width: of the image, in pixels.
        """
        instances = Instances((height, width))
        # Double precision, so that adding undoes the subtraction.
        boxes = torch.tensor([record["bbox"] for record in records], dtype=torch.float64)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes.float())
        instances.scores = torch.tensor([record["score"] for record in records])
        instances.pred_classes = torch.tensor(
            [self.predictor.categories.number_of(record["category_id"]) for record in records],
            dtype=torch.int64,
        )
        if records and "segmentation" in records[0]:
            rles = [record["segmentation"] for record in records]
            instances.pred_masks = CroppedMasks.from_rles(rles, (height, width))
        return instances

    def _write_mask(self, mask: Array, stem: str, name: str) -> None:
        folder = self.output / f"{stem}_masks"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        write_image(folder / name, mask * 255)


def _ranked_by_mask(instances: Instances, least: float) -> Instances:
    """The instances with a mask score of ``least`` or more, best first.

    Their ``scores`` are those of the masks; ``class_scores`` are the former ``scores``.
    """
    order = instances.mask_scores.argsort(descending=True, stable=True)
    ranked = instances[order[instances.mask_scores[order] >= least]]
    ranked.class_scores = ranked.scores
    ranked.scores = ranked.mask_scores
    return ranked
