"""The size of a pixel of a microscope's image, where its TIFF tells it."""

import math
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_MICROMETRES = {
    "pm": 1e-6,
    "nm": 1e-3,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "inch": 25_400.0,
    "in": 25_400.0,
}
_UNIT_OF_TAG = {2: "inch", 3: "cm"}  # values of ResolutionUnit
_IN_AN_INCH = {"inch": 1.0, "cm": 2.54}
"""How many times a length of this unit an inch is."""
_OF_SCREENS = (2.54, 25.4, 72, 96, 100, 150, 200, 300, 400, 600, 1200)
"""Dots per inch that programs write when they know nothing about the image."""
_ROUNDED = 0.02
"""Largest error in dots per inch after rounding per centimetre: 72 dpi is stored as 28.35."""


def pixel_size(path: Path | None) -> tuple[float, float] | None:
    """Width and height of a pixel in micrometres.

    They come from PhysicalSizeX and PhysicalSizeY of OME-XML, from ImageJ's unit with the
    resolution of the TIFF, or from that resolution in pixels per centimetre or inch, unless it is a
    usual one of screens and printers.

    Args:
        path: of an image file of any kind, or None.
    Returns:
        None if the file does not tell it, or tifffile is not installed.
    """
    if path is None or path.suffix.lower() not in (".tif", ".tiff") or not os.path.isfile(path):
        return None
    try:
        import tifffile
    except ImportError:
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            return _of_ome(tiff.ome_metadata) if tiff.is_ome else _of_tags(tiff)
    except Exception:  # the image itself can be read, and damaged metadata may raise anything
        return None


def _of_ome(text: str | None) -> tuple[float, float] | None:
    """From OME-XML, which counts in micrometres unless it says otherwise."""
    if not text or re.search("<!(DOCTYPE|ENTITY)", text):  # entities may expand without end
        return None
    pixels = next(
        (e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}Pixels")), None
    )
    if pixels is None:
        return None
    sizes = (
        _micrometres(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "XY"
    )
    return _both(*sizes)


def _of_tags(tiff: Any) -> tuple[float, float] | None:
    """From the resolution, in ImageJ's unit or that of the tag."""
    tags = tiff.pages.first.tags
    unit = (tiff.imagej_metadata or {}).get("unit")
    if unit is None:
        unit = _UNIT_OF_TAG.get(tags.valueof("ResolutionUnit"), "")
    unit = re.sub(r"\\u00b5", "µ", str(unit), flags=re.IGNORECASE)
    sizes = []
    for tag in ("XResolution", "YResolution"):
        pixels, of = tags.valueof(tag, (0, 1))
        per_unit = pixels / of if of else 0
        dots = per_unit * _IN_AN_INCH.get(unit, 0)
        if not per_unit or any(abs(dots - usual) < _ROUNDED for usual in _OF_SCREENS):
            return None
        sizes.append(_micrometres(1 / per_unit, unit))
    return _both(*sizes)


def _micrometres(value: Any, unit: str) -> float:
    """A length in micrometres; 0 if it is unknown."""
    return float(value or 0) * _MICROMETRES.get(unit, 0)


def _both(width: float, height: float) -> tuple[float, float] | None:
    known = all(0 < side < math.inf for side in (width, height))
    return (width, height) if known else None
