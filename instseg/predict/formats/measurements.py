"""Measurements of every instance: ``measurements.csv``."""

import csv
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from detectron2.utils.logger import log_first_n

from instseg.categories import Categories
from instseg.data.pixel_size import pixel_size
from instseg.data.regions import Regions, open_regions
from instseg.errors import ImageError
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import check_free, replacing, writing

FIRST_COLUMNS = ("image", "instance", "class", "score", "area_px")
_SCORES = ("class_score", "mask_score")
_LENGTHS = (
    ("centroid_x", 0),
    ("centroid_y", 1),
    ("bbox_x", 0),
    ("bbox_y", 1),
    ("bbox_width", 0),
    ("bbox_height", 1),
)
"""Measurements in pixels, and the axis, x or y, that they lie along."""


class Measurements(Format):
    """One row per instance, measured by scikit-image's ``regionprops``.

    ``image`` and ``instance`` are the name of the image and the number of the instance in it, from
    1, the best first: the number in the label image and the ROI set.  ``page`` is the page of a
    stack.  ``centroid_x_px`` and ``centroid_y_px`` count from the centre of the upper left pixel,
    ``bbox_x_px`` and ``bbox_y_px`` from its corner.

    ``mean_intensity`` and ``sum_intensity`` are those of the image as it is in its file, without
    any normalisation.  Several channels have columns of their own, from ``mean_intensity_1`` on;
    transparency is none.  They are empty where the image cannot be read.

    ``area_um2``, ``centroid_x_um`` and so on are in micrometres, where the TIFF says how large its
    pixels are (``pixel_width_um``, ``pixel_height_um``).  Eccentricity and solidity are measured in
    pixels.

    Rows wait in a temporary file, since the first row can only name the columns that the images
    need at the end.
    """

    NAME: ClassVar[str] = "measurements.csv"
    packages = ("skimage",)
    files = (NAME,)

    def __init__(self, output: Path, categories: Categories, about: dict[str, Any]) -> None:
        super().__init__(output, categories, about)
        self._columns: dict[str, None] = dict.fromkeys(FIRST_COLUMNS)

    def __enter__(self) -> "Measurements":
        with writing(self.output / self.NAME):
            check_free(self.output / self.NAME)
            self._rows = tempfile.TemporaryFile(dir=self.output)
        return self

    def __exit__(self, *error: Any) -> None:
        path = self.output / self.NAME
        with self._rows, writing(path), replacing(path) as file:
            self._rows.seek(0)
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            table = csv.DictWriter(text, list(self._columns), restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(map(json.loads, self._rows))
            text.detach()

    def add(self, image: ImageResult) -> None:
        rows = list(_rows(image))
        for row in rows:
            self._columns |= dict.fromkeys(row)
        with writing(self.output / self.NAME):
            self._rows.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())


def _rows(image: ImageResult) -> Iterator[dict[str, Any]]:
    masks = image.needed_masks()
    size = pixel_size(image.path)
    regions = _regions(image)
    try:
        for number, record in enumerate(image.records):
            row = {"image": image.file_name, "instance": number + 1}
            row |= {"class": record["category_name"], "score": record["score"]}
            row |= _measured(*masks.crop(number), regions)
            row |= {key: record[key] for key in _SCORES if key in record}
            row |= {} if image.page is None else {"page": image.page}
            yield row | ({} if size is None else _micrometres(row, *size))
    finally:
        if regions is not None:
            regions.close()


def _regions(image: ImageResult) -> Regions | None:
    """The pixels of the file; None if they cannot be read, which is told once."""
    reason = "there is no such file"
    try:
        regions = None if image.path is None else open_regions(image.path, image.page)
        if regions is not None and regions.shape[:2] == (image.height, image.width):
            return regions
        if regions is not None:
            reason = f"its size is not {image.width} x {image.height}"
            regions.close()
    except ImageError as error:
        reason = str(error)
    text = f"{image.file_name}: no intensities are measured: {reason} (said once)"
    log_first_n(logging.WARNING, text, name=__name__)
    return None


def _measured(x: int, y: int, crop: Any, regions: Regions | None) -> dict[str, Any]:
    """Measurements in pixels, of the crop alone."""
    from skimage.measure import regionprops

    height, width = crop.shape
    if not crop.any():
        return {"area_px": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mask without extent has no hull, told by a warning
        (properties,) = regionprops(crop.astype(np.uint8))
        centroid_y, centroid_x = properties.centroid
        row = {
            "area_px": int(properties.area),
            "centroid_x_px": x + centroid_x,
            "centroid_y_px": y + centroid_y,
            "bbox_x_px": x,
            "bbox_y_px": y,
            "bbox_width_px": width,
            "bbox_height_px": height,
            "eccentricity": float(properties.eccentricity),
            "solidity": float(properties.solidity),
        }
    if regions is not None:
        pixels = regions.read(y, y + height, x, x + width)
        row |= _intensities(crop, pixels[:, :, :3] if regions.alpha else pixels)
    return row


def _intensities(crop: Any, pixels: Any) -> dict[str, float]:
    """Mean and sum of each channel inside a mask."""
    inside = pixels[crop].astype(np.float64)  # (pixels, channels)
    names = (
        [f"_{number}" for number in range(1, inside.shape[1] + 1)] if inside.shape[1] > 1 else [""]
    )
    means, sums = inside.mean(axis=0).tolist(), inside.sum(axis=0).tolist()
    row = {f"mean_intensity{name}": value for name, value in zip(names, means, strict=True)}
    return row | {f"sum_intensity{name}": value for name, value in zip(names, sums, strict=True)}


def _micrometres(row: dict[str, Any], width: float, height: float) -> dict[str, float]:
    """The columns in micrometres of a row in pixels, and the size of its pixels."""
    more = {"pixel_width_um": width, "pixel_height_um": height}
    more["area_um2"] = row["area_px"] * width * height
    lengths = {
        f"{name}_um": row[f"{name}_px"] * (width, height)[axis]
        for name, axis in _LENGTHS
        if f"{name}_px" in row
    }
    return more | lengths
