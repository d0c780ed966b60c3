"""Text files of YOLO's segmentation: ``STEM.txt``."""

import logging

from detectron2.utils.logger import log_first_n

from instseg.masks import polygons
from instseg.predict.earlier import YOLO_END, remove
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import replacing, writing


class YoloText(Format):
    """A line ``class x y x y ...`` per instance: its class number from 0, and one outline.

    Coordinates are corners of pixels, divided by the width and height of the image.  The format
    has no holes and no second outline: holes are filled, and of a mask in several parts only the
    largest is written.  An image without instances has no file.  Each line ends with a tab, which
    readers ignore and by which a later run knows the file as its own.
    """

    suffix = ".txt"

    def add(self, image: ImageResult) -> None:
        masks = image.needed_masks()
        lines = []
        for number, record in enumerate(image.records):
            parts = polygons(*masks.crop(number))
            if len(parts) > 1:
                log_first_n(
                    logging.WARNING,
                    f"{self.path(image)}: only the largest of {len(parts)} parts of an instance is "
                    "written, since YOLO's format has one outline for each (said once)",
                    name=__name__,
                )
            if parts:
                points = parts[0].outer / (image.width, image.height)
                kind = self.categories.number_of(record["category_id"])
                values = " ".join(f"{value:.7g}" for value in points.ravel().tolist())
                lines.append(f"{kind} {values}".encode() + YOLO_END)
        path = self.path(image)
        if lines:
            with writing(path), replacing(path) as file:
                file.writelines(lines)
        else:
            with writing(path):
                remove(path)
