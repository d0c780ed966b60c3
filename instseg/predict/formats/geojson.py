"""GeoJSON for QuPath: ``STEM.geojson``."""

import colorsys
import json
from typing import Any

from instseg.masks import Polygon, Ring, polygons
from instseg.predict.earlier import GEOJSON_START
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import replacing, writing

_SCORES = {"score": "Score", "class_score": "Class score", "mask_score": "Mask score"}
_GOLDEN_RATIO = 0.618


class GeoJson(Format):
    """A FeatureCollection of detections, which QuPath imports by dragging it onto the image.

    Geometries are a Polygon, or a MultiPolygon for a mask in several parts, in pixels from the
    upper left corner of the image, along the edges of pixels, with holes.  An instance without
    pixels is left out.
    """

    suffix = ".geojson"

    def add(self, image: ImageResult) -> None:
        path = self.path(image)
        with writing(path), replacing(path) as file:
            file.write(GEOJSON_START)
            separator = b"\n"
            for number, feature in enumerate(self._features(image)):
                file.write((separator if not number else b",\n") + feature)
            file.write(b"\n]}\n")

    def _features(self, image: ImageResult) -> Any:
        masks = image.needed_masks()
        for number, record in enumerate(image.records):
            parts = polygons(*masks.crop(number))
            if not parts:
                continue
            name = record["category_name"]
            # As a list, which all versions of QuPath read.
            scores = [
                {"name": text, "value": record[key]}
                for key, text in _SCORES.items()
                if key in record
            ]
            colour = _colour(self.categories.number_of(record["category_id"]))
            properties = {
                "objectType": "detection",
                "name": f"{number + 1}",
                "classification": {"name": name, "color": colour},
                "measurements": scores,
            }
            feature = {"type": "Feature", "geometry": _geometry(parts), "properties": properties}
            yield json.dumps(feature).encode()


def _geometry(parts: list[Polygon]) -> dict[str, Any]:
    rings = [[_closed(ring) for ring in (part.outer, *part.holes)] for part in parts]
    if len(rings) == 1:
        return {"type": "Polygon", "coordinates": rings[0]}
    return {"type": "MultiPolygon", "coordinates": rings}


def _closed(ring: Ring) -> list[list[int]]:
    points: list[list[int]] = ring.tolist()
    return [*points, points[0]]


def _colour(number: int) -> list[int]:
    """Red, green and blue of a class: hues as far apart as they can be, in any number."""
    hue = number * _GOLDEN_RATIO % 1
    return [round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.9)]
