"""Prediction on large image files, tile by tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import cv2
import numpy as np
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from instseg.data.images import Array
from instseg.errors import ImageError
from instseg.files import stamp
from instseg.inference.layout import Rect
from instseg.inference.tile_sources import TileSource, opened
from instseg.inference.tiles import layout_of, predict_tiles
from instseg.masks import CroppedMasks
from instseg.predict.earlier import remove
from instseg.predict.formats import Format
from instseg.predict.images import add_results
from instseg.predict.outputs import overlay_name
from instseg.predict.records import write_image
from instseg.predict.results import Results
from instseg.predict.sources import Source
from instseg.predict.tile_records import TileRecords, tiles_file

_OVERLAY = 4000
"""Longest side of an overlay in pixels; those of larger images are scaled down."""
_BAND = 3 * 2**24
"""Bytes of the image that are read together for its overlay."""


@dataclass(frozen=True)
class TileSettings:
    """How images are divided.

    Attributes:
        tile: side of a tile in pixels.
        overlap: pixels that tiles share; None follows from the training of the model.
        info: further settings that the results depend on; JSON.
        resume: go on with the tiles of an earlier run.
    """

    tile: int
    overlap: int | None = None
    info: dict[str, Any] = field(default_factory=dict)
    resume: bool = False


def predict_tiled_images(
    results: Results,
    sources: Sequence[Source],
    formats: Sequence[Format],
    settings: TileSettings,
) -> None:
    """Predict on images, one after the other, and write the results of each.

    What was found in a tile is kept in ``NAME.tiles.jsonl`` until the run is over.

    Args:
        results: counts images that cannot be used.
        sources: images.
        formats: they take the results of each image.
    Raises:
        OutputError: a result cannot be written.
        ConfigError: an earlier run to be resumed had other settings.
    """
    numbers = count(1)
    for source in tqdm(sources, unit="image", disable=None if len(sources) > 1 else True):
        try:
            with opened(source.name, results.predictor.cfg, page=source.page) as image:
                instances = _predict(results, source, image, settings)
                size = image.height, image.width
                add_results(results, source, next(numbers), size, instances, formats)
                if results.overlay:
                    overlay = results.draw(*scaled_down(image, instances))
                    write_image(results.output / overlay_name(source, tiled=True), overlay)
        except ImageError as error:
            results.fail(error)
    for source in sources:
        remove(tiles_file(results.output, source.stem))


def _predict(
    results: Results, source: Source, image: TileSource, settings: TileSettings
) -> Instances:
    weights = results.predictor.cfg.MODEL.WEIGHTS
    layout = layout_of(results.predictor, image, settings.tile, settings.overlap)
    header = {
        "info": settings.info | {"tile": layout.tile, "overlap": layout.overlap},
        "image": {
            "file_name": source.name,
            "page": source.page,
            "width": image.width,
            "height": image.height,
            "size and time of the file": list(stamp(source.name)),
        },
        "weights": {"size and time of the file": list(stamp(weights))},
    }
    path = tiles_file(results.output, source.stem)
    with TileRecords(path, header, layout, resume=settings.resume) as tiles:
        return predict_tiles(
            results.predictor, image, layout, results=tiles, keep=results.keep, progress=True
        )


def scaled_down(
    image: TileSource, instances: Instances, longest: int = _OVERLAY
) -> tuple[Array, Instances]:
    """An image and its instances at a size that can be shown; unchanged if they have it.

    Reads the image in bands.  Instances too small to have a pixel are left out.

    Returns:
        (h, w, 3) uint8 in BGR order, ``longest`` pixels a side at most, and the instances on it.
    """
    factor = math.ceil(max(image.height, image.width) / longest)
    rows = factor * max(min(64, _BAND // (factor * image.width * image.pixel_bytes)), 1)
    bands = [
        _shrunk(image.read(Rect(0, top, image.width, min(top + rows, image.height))).pixels, factor)
        for top in range(0, image.height, rows)
    ]
    drawn = np.concatenate(bands).astype(np.uint8)
    if drawn.shape[2] == 1:
        drawn = np.repeat(drawn, 3, axis=2)
    if factor == 1:
        return drawn, instances
    masks = _thinned(instances.pred_masks, factor, drawn.shape[:2])
    fields = instances.get_fields() | {"pred_boxes": Boxes(instances.pred_boxes.tensor / factor)}
    scaled = Instances(drawn.shape[:2], **(fields | {"pred_masks": masks}))
    return drawn, scaled[masks.boxes[:, 2] > 0]


def _shrunk(pixels: Array, factor: int) -> Array:
    """(h, w, C) the mean of each square of ``factor`` pixels a side."""
    height, width, channels = pixels.shape
    below, right = -height % factor, -width % factor
    padded = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
    size = (padded.shape[1] // factor, padded.shape[0] // factor)
    small = cv2.resize(padded, size, interpolation=cv2.INTER_AREA)
    return small.reshape(*small.shape[:2], channels)


def _thinned(masks: CroppedMasks, factor: int, size: tuple[int, ...]) -> CroppedMasks:
    """Every ``factor``-th pixel of each row and column, those in the middle."""
    crops, corners = [], []
    for index in range(len(masks)):
        x, y, crop = masks.crop(index)
        left, top = (factor // 2 - x) % factor, (factor // 2 - y) % factor
        crops.append(np.ascontiguousarray(crop[top::factor, left::factor]))
        corners.append(((x + left) // factor, (y + top) // factor))
    return CroppedMasks.from_crops(crops, np.array(corners).reshape(-1, 2), (size[0], size[1]))
