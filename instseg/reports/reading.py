"""Read and check results that are to be compared with a ground truth."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instseg.data.build import register_builtin_datasets, register_dataset
from instseg.data.dataset import DataSet, load
from instseg.data.records import check_image_ids
from instseg.errors import ConfigError, DatasetError, short
from instseg.masks import as_text, rle_box
from instseg.predict.result_file import checked_mask, open_results

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


@dataclass(frozen=True)
class CheckedResults:
    """Results that fit a ground truth.

    Attributes:
        records: ``image_id``, ``category_id``, ``score``, ``bbox`` (x, y, width, height) and, if
            all have masks, ``segmentation``, a compressed RLE.
        tasks: "segm" if results and ground truth have masks; "bbox" always.
    """

    records: list[dict[str, Any]]
    tasks: tuple[str, ...]


def read_dataset(name: str) -> DataSet:
    """A data set with a ground truth.

    Raises:
        DatasetError: there is no such set, it cannot be read, or it has no ground truth.
    """
    register_builtin_datasets()
    register_dataset(name)
    dataset = load(name)
    check_image_ids(name, dataset.records)
    if "annotations" not in dataset.coco.dataset:
        raise DatasetError(
            f"data set {name} has no annotations; expected a set with the ground truth of its "
            "images"
        )
    return dataset


def read_results(path: Path, dataset: DataSet) -> CheckedResults:
    """The results in a file that ``instseg results`` reads, except those of a video.

    Boxes that are missing are those of the masks.  Warns of results that are there twice, and if
    there are none.

    Raises:
        ConfigError: an entry is malformed or does not belong to the data set, or some have masks
            and others have none.
    """
    file = open_results(path)
    if file.is_video:
        raise ConfigError(
            f"{path} holds the frames of a video; expected results of images: predict with "
            f"--images-of {dataset.name}"
        )
    coco = dataset.coco
    records: list[dict[str, Any]] = []
    for number, entry in enumerate(file.entries()):
        records.append(_checked(path, entry, coco.imgs, coco.cats, dataset.name))
        if ("segmentation" in records[-1]) != ("segmentation" in records[0]):
            has, has_none = (number, 0) if "segmentation" in records[-1] else (0, number)
            raise ConfigError(
                f"{path}: entry {has} has a mask and entry {has_none} has none; expected masks of "
                "all instances or of none"
            )
    if not records:
        logger.warning("%s holds no instance: all those of the ground truth count as missed", path)
    _warn_of_copies(path, records)
    return CheckedResults(records, _tasks(records, dataset))


def _checked(
    path: Path,
    entry: dict[str, Any],
    images: Mapping[Any, Any],
    categories: Mapping[Any, Any],
    dataset_name: str,
) -> dict[str, Any]:
    key, category = entry["image_id"], entry.get("category_id")
    image = images.get(key)
    if image is None:
        raise ConfigError(
            f"{path}: the image_id {short(key)} is not in {dataset_name}; its images have ids such "
            f"as {short(next(iter(images)))}, which `instseg predict --images-of {dataset_name}` "
            "writes"
        )
    if type(category) is not int or category not in categories:
        listed = [f"{number} ({short(c['name'])})" for number, c in categories.items()]
        more = ", ..." if len(listed) > _MOST_NAMED else ""
        raise ConfigError(
            f"{path}: an instance of image {short(key)} has the category_id {short(category)}; "
            f"{dataset_name} has {', '.join(listed[:_MOST_NAMED])}{more}"
        )
    mask = checked_mask(path, f"image {short(key)}", entry, image["height"], image["width"])
    box = entry.get("bbox")
    record = {"image_id": key, "category_id": category, "score": float(entry["score"])}
    if mask is not None:
        record["bbox"] = rle_box(mask)
        record["segmentation"] = as_text(mask) if isinstance(mask["counts"], bytes) else mask
    elif box is None:
        raise ConfigError(
            f"{path}: an instance of image {short(key)} has neither bbox nor segmentation"
        )
    if box is not None:
        record["bbox"] = [float(value) for value in box]
    return record


def _warn_of_copies(path: Path, records: list[dict[str, Any]]) -> None:
    different = {
        (
            *(record["image_id"], record["category_id"], record["score"], *record["bbox"]),
            record.get("segmentation", {}).get("counts"),
        )
        for record in records
    }
    copies = len(records) - len(different)
    if copies:
        logger.warning(
            "%s: %d of %d instances are copies of others; each counts, as in COCO's code, so that "
            "the copies are false alarms",
            *(path, copies, len(records)),
        )


def _tasks(records: list[dict[str, Any]], dataset: DataSet) -> tuple[str, ...]:
    if records and "segmentation" not in records[0]:
        return ("bbox",)
    if all(annotation.get("segmentation") for annotation in dataset.coco.anns.values()):
        return ("bbox", "segm")
    logger.warning(
        "data set %s has instances without masks: boxes alone are evaluated", dataset.name
    )
    return ("bbox",)
