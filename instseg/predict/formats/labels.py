"""Label images: ``STEM_labels.tif``."""

from fractions import Fraction
from typing import Any

from instseg.data.pixel_size import pixel_size
from instseg.predict.earlier import MARK
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import replacing, writing

_LARGEST = 2**32 - 1


class LabelImages(Format):
    """A TIFF whose pixels are the numbers of instances, from 1, and 0 for the background.

    (H, W) uint16, or uint32 for more than 65535 instances, with deflate.  Where instances overlap,
    the one with the highest score is on top; one that others cover completely has no pixel.  The
    file is an OME-TIFF, which ImageJ and QuPath read, with the size of a pixel where the image file
    tells it.
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
        path = self.path(image)
        with writing(path), replacing(path) as file:
            tifffile.imwrite(
                file,
                image.needed_masks().to_label_image(),
                ome=True,
                compression="zlib",
                software=MARK,
                metadata=metadata,
                **options,
            )


def _per_centimetre(micrometres: float) -> tuple[int, int]:
    """Pixels per centimetre as a fraction that a TIFF can hold."""
    pixels = Fraction(10_000 / micrometres).limit_denominator(10_000)
    return min(pixels.numerator, _LARGEST), pixels.denominator
