"""Draw the images on which results are worst."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from instseg.data.dataset import DataSet
from instseg.data.images import Array, read_image
from instseg.data.intensity import Intensity
from instseg.errors import ImageError, one_line
from instseg.evaluation.results import Record, TaskResult
from instseg.masks import CroppedMasks, to_rle
from instseg.predict.earlier import is_ours
from instseg.predict.records import write_image, writing
from instseg.visualize import OverlayStyle, draw_instances, with_legend

logger = logging.getLogger(__name__)

OUTCOMES = {
    "hit": (233, 180, 86),  # sky blue
    "miss": (0, 94, 213),  # vermilion
    "false alarm": (66, 228, 240),  # yellow
}
"""Kind of a drawn instance → its colour in BGR order.

The colours are of the palette of Okabe and Ito (2008), which people with any colour vision tell
apart, and of different brightness.
"""
_NAME = re.compile(r"\d{3}_.*\.png")


@dataclass(frozen=True)
class ImageOutcomes:
    """Numbers of an image at a score.

    Attributes:
        number: of the image in the order of its ids.
        hits, misses, false_alarms: see :class:`instseg.evaluation.results.Operating`.
    """

    number: int
    hits: int
    misses: int
    false_alarms: int


def outcomes_by_image(result: TaskResult, count: int, score: float) -> list[ImageOutcomes]:
    """Numbers of each image, the worst first: the one with the most misses and false alarms.

    Among equals, the one with fewer hits is worse.

    Args:
        count: of the images.
        score: detections with a lower score are left out.
    """
    outcomes = result.outcomes
    counts = outcomes.scores >= score
    is_found = outcomes.hit_scores >= score
    hits = np.bincount(outcomes.instance_images[is_found], minlength=count)
    misses = np.bincount(outcomes.instance_images[~is_found], minlength=count)
    alarms = np.bincount(outcomes.detection_images[counts & ~outcomes.is_hit], minlength=count)
    order = np.lexsort((hits, -(misses + alarms)))
    rows = np.stack([order, hits[order], misses[order], alarms[order]], axis=1).tolist()
    return [ImageOutcomes(*row) for row in rows]


def in_order_of_ids(dataset: DataSet) -> list[dict[str, Any]]:
    """Its records, by the numbers that :class:`ImageOutcomes` has of the images."""
    return sorted(dataset.records, key=lambda record: record["image_id"])


def draw_worst(
    folder: Path,
    dataset: DataSet,
    results: Sequence[Record],
    result: TaskResult,
    worst: Sequence[ImageOutcomes],
    score: float,
) -> int:
    """Write an image with hits, misses and false alarms for each of ``worst``.

    Removes those of an earlier evaluation.

    Args:
        folder: created if need be.
        results: the list that ``result`` was computed from.
        worst: images, see :func:`outcomes_by_image`.
        score: detections with a lower score are left out.
    Returns:
        how many images could not be read; a line about each is logged.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if _NAME.fullmatch(file.name) and is_ours(file):
                file.unlink()
    records = in_order_of_ids(dataset)
    failures = 0
    for rank, image in enumerate(worst, start=1):
        record = records[image.number]
        try:
            pixels = _pixels(record)
            instances = _instances(dataset, results, result, image.number, score, record)
            drawn = _drawn(pixels, instances)
            stem = re.sub(r"[^\w.-]+", "_", Path(str(record["file_name"])).stem)[-80:]
            write_image(folder / f"{rank:03d}_{stem}.png", drawn)
        except ImageError as error:
            failures += 1
            logger.warning("%s", one_line(error))
    return failures


def _pixels(record: Mapping[str, Any]) -> Array:
    """The image as people see it; one of more than 8 bits is stretched to its own range."""
    path = record["file_name"]
    try:
        pixels = read_image(path)
    except ImageError:
        pixels = read_image(path, intensity=Intensity("percentile"))
    height, width = pixels.shape[:2]
    if (height, width) != (record["height"], record["width"]):
        raise ImageError(
            f"{path} is {width} x {height} pixels, the data set says {record['width']} x "
            f"{record['height']}; it is not drawn"
        )
    return pixels


def _instances(
    dataset: DataSet,
    results: Sequence[Record],
    result: TaskResult,
    number: int,
    score: float,
    record: Mapping[str, Any],
) -> Instances:
    """What is drawn on an image; classes are the numbers of :data:`OUTCOMES`."""
    outcomes = result.outcomes
    chosen = (outcomes.detection_images == number) & (outcomes.scores >= score)
    missed = (outcomes.instance_images == number) & (outcomes.hit_scores < score)
    shapes: list[Record] = [results[index] for index in outcomes.detections[chosen]]
    shapes += [dataset.coco.anns[key] for key in outcomes.instances[missed].tolist()]
    kinds = np.where(outcomes.is_hit[chosen], 0, 2).tolist() + [1] * int(missed.sum())
    size = int(record["height"]), int(record["width"])
    instances = Instances(size)
    boxes = torch.tensor([shape["bbox"] for shape in shapes], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.ones(len(shapes))
    instances.pred_classes = torch.tensor(kinds, dtype=torch.int64)
    colours = np.array(list(OUTCOMES.values()), dtype=np.uint8)
    instances.colours = torch.from_numpy(colours)[instances.pred_classes]
    if result.task == "segm":
        rles = [to_rle(shape["segmentation"], *size) for shape in shapes]
        instances.pred_masks = CroppedMasks.from_rles(rles, size)
    return instances


def _drawn(pixels: Array, instances: Instances) -> Array:
    counts = np.bincount(instances.pred_classes.numpy(), minlength=len(OUTCOMES)).tolist()
    scene = draw_instances(pixels, instances, style=OverlayStyle(labels="none"))
    legend = zip(OUTCOMES.items(), counts, strict=True)
    return with_legend(scene, [(f"{name} {count}", colour) for (name, colour), count in legend])
