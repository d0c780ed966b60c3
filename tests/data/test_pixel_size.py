"""The size of a pixel, as a TIFF tells it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from instseg.data.pixel_size import pixel_size

SIZE = (40, 50)


def write_tiff(path: Path, kind: str) -> None:
    """An image of ``SIZE`` whose pixels are 0.5 x 0.25 micrometres, told in some way."""
    pixels = np.random.default_rng(0).integers(0, 255, SIZE, dtype=np.uint8)
    options: dict[str, dict[str, Any]] = {
        "ome": {
            "ome": True,
            "metadata": {
                "axes": "YX",
                "PhysicalSizeX": 500,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": 0.25,
            },
        },
        "imagej": {"imagej": True, "resolution": (2, 4), "metadata": {"unit": "um"}},
        "micron": {"imagej": True, "resolution": (2, 4), "metadata": {"unit": "micron"}},
        "escaped": {"imagej": True, "resolution": (2, 4), "metadata": {"unit": "\\u00B5m"}},
        "cm": {"resolution": (20_000, 40_000), "resolutionunit": "CENTIMETER"},
        "inch": {"resolution": (50_800, 101_600), "resolutionunit": "INCH"},
        "screen": {"resolution": (72, 72), "resolutionunit": "INCH"},
        "screen in cm": {"resolution": (28.35, 28.35), "resolutionunit": "CENTIMETER"},
        "libvips": {"resolution": (10, 10), "resolutionunit": "CENTIMETER"},
        "one": {"resolution": (1, 1), "resolutionunit": "CENTIMETER"},
        "pixels": {"imagej": True, "resolution": (1, 1), "metadata": {"unit": "pixel"}},
        "zero": {"resolution": ((0, 1), (0, 1)), "resolutionunit": "CENTIMETER"},
        "none": {},
    }
    tifffile.imwrite(path, pixels, **options[kind])


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"<OME", b"<!DOCTYPE a><OME"), (b"Pixels", b"Pixles"), (b"<OME", b"<EMO")],
    ids=["entities", "no pixels", "no OME"],
)
def test_metadata_that_cannot_be_trusted_tell_no_size(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, "ome")
    with tifffile.TiffFile(path) as tiff:
        text = (tiff.ome_metadata or "").encode()
    assert pixel_size(path) is not None and old in text
    pixels = np.zeros(SIZE, np.uint8)
    tifffile.imwrite(path, pixels, description=text.replace(old, new), metadata=None)
    assert pixel_size(path) is None


@pytest.mark.parametrize("kind", ["ome", "imagej", "micron", "escaped", "cm", "inch"])
def test_a_tiff_tells_the_size_of_its_pixels(tmp_path: Path, kind: str) -> None:
    write_tiff(tmp_path / "a.tif", kind)
    assert pixel_size(tmp_path / "a.tif") == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize(
    "kind", ["screen", "screen in cm", "libvips", "one", "pixels", "zero", "none"]
)
def test_a_size_that_says_nothing_is_none(tmp_path: Path, kind: str) -> None:
    write_tiff(tmp_path / "a.tif", kind)
    assert pixel_size(tmp_path / "a.tif") is None


def test_a_file_that_is_no_tiff_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0 no more")
    assert pixel_size(tmp_path / "a.tif") is None
    assert pixel_size(tmp_path / "b.tif") is None and pixel_size(None) is None


def test_without_tifffile_no_size_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiff(tmp_path / "a.tif", "ome")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert pixel_size(tmp_path / "a.tif") is None
