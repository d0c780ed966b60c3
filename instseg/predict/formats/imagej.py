"""ROI sets of ImageJ: ``STEM_rois.zip``."""

import re
import zipfile
from typing import Any

import numpy as np

from instseg.masks import Polygon, polygons
from instseg.predict.earlier import MARK
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import replacing, writing

_LONGEST_NAME = 50
_MOVE, _LINE, _CLOSE = 0, 1, 4
_SHORT = 2**15


class ImageJRois(Format):
    """A ROI per instance for ImageJ's ROI Manager, named ``0001_CLASS`` by its number.

    An instance of one part without holes is a traced polygon, any other a composite ROI.
    Coordinates are whole numbers, the corners of pixels with (0, 0) at the upper left corner of the
    image, as ImageJ's own tracing gives them, so a ROI covers exactly the pixels of its mask; there
    is no shift by half a pixel.  An instance without pixels is left out.
    """

    packages = ("roifile",)
    suffix = "_rois.zip"

    def add(self, image: ImageResult) -> None:
        masks = image.needed_masks()
        digits = max(len(str(len(image.records))), 4)
        path = self.path(image)
        with (
            writing(path),
            replacing(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            archive.comment = MARK.encode()
            for number, record in enumerate(image.records):
                parts = polygons(*masks.crop(number))
                kind = re.sub(r"[^\w-]+", "_", record["category_name"])[:_LONGEST_NAME]
                name = f"{number + 1:0{digits}d}_{kind}"
                if parts:  # a ZipInfo has a fixed date, so the same results are the same file
                    entry = zipfile.ZipInfo(f"{name}.roi")
                    archive.writestr(entry, _roi(parts, name).tobytes())


def _roi(parts: list[Polygon], name: str) -> Any:
    from roifile import ROI_TYPE, ImagejRoi

    rings = [ring for part in parts for ring in (part.outer, *part.holes)]
    corners = np.concatenate(rings)
    if len(rings) == 1 and corners.max() < _SHORT:
        roi = ImagejRoi.frompoints(corners, name=name)
        roi.roitype = ROI_TYPE.TRACED
        return roi
    path: list[float] = []
    for ring in rings:
        for number, (x, y) in enumerate(ring.tolist()):
            path += (_LINE if number else _MOVE, x, y)
        path.append(_CLOSE)
    left, top = np.minimum(corners.min(axis=0), _SHORT - 1).tolist()
    right, bottom = np.minimum(corners.max(axis=0), _SHORT - 1).tolist()
    return ImagejRoi(
        roitype=ROI_TYPE.RECT,
        name=name,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        shape_roi_size=len(path),
        multi_coordinates=np.array(path, dtype=np.float32),
    )
