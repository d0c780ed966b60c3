"""Images that are read tile by tile, each with the intensities of the whole image."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from instseg.data.image_arrays import check_image
from instseg.data.image_headers import MAX_PIXELS
from instseg.data.intensity import Intensity, ModelImage, finite_limits
from instseg.data.pillow_images import convert_image
from instseg.data.regions import Regions, open_regions, sample
from instseg.errors import ImageError
from instseg.inference.layout import Rect


@dataclass(frozen=True)
class TileSource:
    """An image that gives its tiles.

    Attributes:
        height, width: of the image.
        read: a part of the image, as a :class:`instseg.inference.predictor.Predictor` takes it.
        pixel_bytes: what a pixel takes while it is read.
    """

    height: int
    width: int
    read: Callable[[Rect], ModelImage]
    pixel_bytes: int = 3


@contextmanager
def opened(
    image: Any, cfg: CfgNode, name: str = "image", page: int | None = None
) -> Iterator[TileSource]:
    """Open an image.

    ``INPUT.NORMALIZE percentile`` is measured once, on the image
    (:func:`instseg.data.regions.sample`), so that neighbouring tiles have the same brightness.

    Args:
        image: a path, read by parts where the format allows it; an array or a Pillow image; or
            :class:`instseg.data.regions.Regions`, which stay open.
        cfg: of the model.
        name: of an image that is no path, in error messages.
        page: of a path that is a stack, counted from 0.
    Raises:
        ImageError, TypeError: it cannot be read or used; or it is an array that is so large that it
            has to be a file.
    """
    if isinstance(image, str | os.PathLike):
        with open_regions(image, page) as regions:
            yield _of_regions(regions, cfg, os.fspath(image))
    elif isinstance(image, np.ndarray | Image.Image) or not hasattr(image, "read"):
        yield _of_pixels(image, cfg, name)
    else:
        yield _of_regions(image, cfg, name)


def _of_regions(regions: Regions, cfg: CfgNode, name: str) -> TileSource:
    intensity = Intensity.of(cfg)
    plain = intensity.normalize == "none" and regions.dtype == np.uint8
    pixels = regions.read(0, 1, 0, 1) if plain else sample(regions)
    scaling = intensity.scaling(pixels, source=name, alpha=regions.alpha)

    def read(rect: Rect) -> ModelImage:
        part = regions.read(rect.y0, rect.y1, rect.x0, rect.x1)
        if part.dtype.kind == "f":  # the sample need not have shown them
            for channel in scaling.channels:
                finite_limits(part[:, :, channel], name)
        return ModelImage(scaling.apply(part, format=_order(cfg)))

    height, width, channels = regions.shape
    return TileSource(height, width, read, max(channels * regions.dtype.itemsize, 3))


def _of_pixels(image: Any, cfg: CfgNode, name: str) -> TileSource:
    settings: dict[str, Any] = {"format": _order(cfg), "intensity": Intensity.of(cfg)}
    if isinstance(image, Image.Image):
        pixels = convert_image(image, source=name, **settings)
    else:
        shape: tuple[int, ...] = getattr(image, "shape", ())
        if len(shape) in (2, 3) and shape[0] * shape[1] > MAX_PIXELS:
            raise ImageError(
                f"{name} is an array of {shape[1]}x{shape[0]} pixels; arrays may have {MAX_PIXELS}:"
                " save it as a TIFF with tiles and pass its path, which is read by parts"
            )
        pixels = check_image(image, source=name, **settings)

    def read(rect: Rect) -> ModelImage:
        return ModelImage(pixels[rect.y0 : rect.y1, rect.x0 : rect.x1])

    return TileSource(pixels.shape[0], pixels.shape[1], read)


def _order(cfg: CfgNode) -> str:
    """The order of channels of a ModelImage; the predictor changes it to ``INPUT.FORMAT``."""
    return "L" if cfg.INPUT.FORMAT == "L" else "BGR"
