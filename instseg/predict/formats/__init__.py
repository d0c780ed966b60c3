"""The files in which ``instseg predict`` and ``instseg results`` write instances.

Each format is a class of its own that takes the results of one image after the other, and holds no
more than one.  Masks are cropped, so that none costs the size of the image.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from instseg.categories import Categories
from instseg.errors import ConfigError
from instseg.optional import require
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.formats.coco import Coco
from instseg.predict.formats.geojson import GeoJson
from instseg.predict.formats.imagej import ImageJRois
from instseg.predict.formats.labels import LabelImages
from instseg.predict.formats.measurements import Measurements
from instseg.predict.formats.yolo import YoloText

__all__ = ["DEFAULT", "FORMATS", "Format", "ImageResult", "opened", "parse"]

FORMATS: dict[str, type[Format]] = {
    "coco": Coco,
    "labels": LabelImages,
    "csv": Measurements,
    "geojson": GeoJson,
    "imagej": ImageJRois,
    "yolo": YoloText,
}
DEFAULT = "coco"
"""Also the only format that takes results without masks."""


def parse(text: str, option: str) -> tuple[str, ...]:
    """Names of formats from ``NAME,NAME,...``, each once.

    Args:
        option: name of the argument, for messages.
    Raises:
        ConfigError: a name is unknown, or the packages of a format are not installed.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(
                f"{option} has {name!r}; expected one or more of {', '.join(FORMATS)}, with commas "
                "between them"
            )
        for package in FORMATS[name].packages:
            require(package, "microscopy", f"{option} {name}")
    return names


@contextmanager
def opened(
    names: Sequence[str], output: Path, categories: Categories, about: dict[str, Any]
) -> Iterator[list[Format]]:
    """The formats, ready to take images.

    Args:
        names: from :func:`parse`.
        output: folder of everything that is written.
        categories: the classes, in their order.
        about: settings of the run, JSON.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(FORMATS[name](output, categories, about)) for name in names]
