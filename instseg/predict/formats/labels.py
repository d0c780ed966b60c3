"""Label images: ``STEM_labels.tif``."""

import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from instseg.data.pixel_size import pixel_size
from instseg.masks import CroppedMasks
from instseg.predict.earlier import MARK
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import replacing, writing

_LARGEST = 2**32 - 1
_STRIP = 2**18
"""Bytes of a strip of the file, before compression."""
_BAND = 2**22
"""Pixels of the label image that are made together."""
_CLASSIC = 2**32 - 2**25
"""With more bytes of pixels the file is a BigTIFF; other TIFFs end at 4 GB."""


class LabelImages(Format):
    """A TIFF whose pixels are the numbers of instances, from 1, and 0 for the background.

    (H, W) uint16, or uint32 for more than 65535 instances, with deflate.  Where instances overlap,
    the one with the highest score is on top; one that others cover completely has no pixel.  The
    file is an OME-TIFF, which ImageJ and QuPath read, with the size of a pixel where the image file
    tells it.  The image is made and written by strips, so it may have any size.
    """

    packages = ("tifffile",)
    suffix = "_labels.tif"

    def add(self, image: ImageResult) -> None:
        import tifffile

        metadata: dict[str, Any] = {"axes": "YX"}
        options: dict[str, Any] = {}
        if (size := pixel_size(image.path)) is not None:
            for axis, micrometres in zip("XY", size, strict=True):
                metadata |= {f"PhysicalSize{axis}": micrometres, f"PhysicalSize{axis}Unit": "µm"}
            options["resolution"] = tuple(_per_centimetre(side) for side in size)
            options["resolutionunit"] = "CENTIMETER"
        masks, path = image.needed_masks(), self.path(image)
        kind = masks.to_label_image(0, 0).dtype
        rows = max(_STRIP // (image.width * kind.itemsize), 1)
        with writing(path), replacing(path) as file:
            tifffile.imwrite(
                file,
                _strips(masks, rows),
                shape=(image.height, image.width),
                dtype=kind,
                rowsperstrip=rows,
                bigtiff=image.height * image.width * kind.itemsize > _CLASSIC,
                ome=True,
                compression="zlib",
                software=MARK,
                metadata=metadata,
                **options,
            )


def _strips(masks: CroppedMasks, rows: int) -> Iterator[bytes]:
    """The label image, compressed, in parts of so many rows; the last one may have fewer."""
    height, width = masks.image_size
    band = rows * max(_BAND // (rows * width), 1)
    for top in range(0, height, band):
        labels = masks.to_label_image(top, min(top + band, height))
        for first in range(0, len(labels), rows):
            yield zlib.compress(labels[first : first + rows].data)


def _per_centimetre(micrometres: float) -> tuple[int, int]:
    """Pixels per centimetre as a fraction that a TIFF can hold."""
    pixels = Fraction(10_000 / micrometres).limit_denominator(10_000)
    return min(pixels.numerator, _LARGEST), pixels.denominator
