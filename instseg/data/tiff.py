"""Read the images in TIFF files of any depth by the package tifffile.

**Pages.**  A file holds one image or a stack of them.  Every position along an axis other than
rows, columns and channels is a page: time, depth (z), or just the order in the file.  Pages are
numbered from 0 in the order of the file's axes, the last axis running fastest.  Channels are the
samples of a pixel and the axis C of OME-TIFF and ImageJ (up to 7 there); they are part of an image.
Smaller copies (pyramids, thumbnails) and masks are no pages.  Formats of slide scanners have one
page, the slide.

Pages of several sizes are read too; each is an image of its own.

OME metadata may name planes in further files.  A file stands for the pages of which it holds a
plane itself, so a set of files has every page once; the channels of a page come from all of them.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.utils.logger import log_first_n

from instseg.data.tiff_errors import TiffLog, import_package, reporting
from instseg.errors import ImageError

Array = npt.NDArray[Any]

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files."""
_SEVERAL_IMAGES = ("generic", "imagej", "ome", "shaped", "uniform")
"""Kinds of files in which every series holds images; in others only the first does."""
_IMAGEJ_CHANNELS = 7
_PLANES = ("YX", "YXS", "SYX", "ZYX")
"""Axes of what one directory of a file holds: S are samples of a pixel."""
_TRANSPARENCY = (1, 2)
"""Values of the tag ExtraSamples: multiplied into the colours, or not."""
_COLOURS = ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE", "YCBCR")


def several_images(source: str, count: str) -> ImageError:
    """The refusal of a stack where one image is expected."""
    return ImageError(
        f"{source}: is a TIFF of {count} images; expected one in a file: `instseg predict --pages "
        "all` (or N, or A:B) takes the pages of a stack; elsewhere split it, for example with "
        "`magick STACK.tif PAGE_%03d.tif`"
    )


@dataclass(frozen=True)
class Page:
    """An image in a TIFF file.

    Attributes:
        source: its name in error messages.
        series: tifffile's ``TiffPageSeries`` that it belongs to.
        planes: numbers of its planes within the series, one for each position on the axis C.
        axes: of a plane: YX, YXS or SYX.
        inner: planes in each directory of the file; more than one in volumes.
        shape: (H, W, C) as stored, not turned upright.
        dtype: of its pixels.
    """

    source: str
    series: Any
    planes: tuple[int, ...]
    axes: str
    inner: int
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    @property
    def alpha(self) -> bool:
        """Whether the last of four channels is transparency."""
        plane = self.series.keyframe
        told = any(int(extra) in _TRANSPARENCY for extra in plane.extrasamples)
        return self.shape[2] == 4 and plane.photometric.name == "RGB" and told

    @property
    def inverted(self) -> bool:
        """Whether 0 is white in the file, so that its numbers are inverted to intensities."""
        keyframe = self.series.keyframe
        return keyframe.photometric.name == "MINISWHITE" and keyframe.dtype.kind in "bu"

    @property
    def offset(self) -> int | None:
        """Place of the first plane in the file; None unless all planes lie there uncompressed."""
        offset: int | None = self.series.dataoffset
        return None if self.series.is_multifile else offset

    @property
    def plane_shape(self) -> tuple[int, ...]:
        """Lengths of :attr:`axes`."""
        shape: tuple[int, ...] = self.series.keyframe.shape
        return shape[len(shape) - len(self.axes) :]

    def index(self, plane: int) -> tuple[int, ...]:
        """The place of a plane in the axes of the series before those of a plane."""
        lengths = self.series.shape[: len(self.series.axes) - len(self.axes)]
        return tuple(int(i) for i in np.unravel_index(plane, lengths)) if lengths else ()


class TiffImages:
    """An open TIFF file; a context manager.

    Attributes:
        source: name of the file in error messages.
        pages: its images, in order.
        damage: why there may be further ones that cannot be found; "" if there are none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            ImageError: no TIFF, damaged, of unknown kind, or tifffile is not installed.
        """
        self.source = str(path)
        tifffile = import_package("tifffile", self.source)
        log = TiffLog()
        with reporting(self.source), log.collecting():
            self._file = tifffile.TiffFile(Path(path))
        try:
            with reporting(self.source), log.collecting():
                self.pages = self._pages(log)
            lost = log.has("invalid page offset")
            self.damage = f"is cut off or damaged behind page {len(self.pages) - 1}" * lost
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "TiffImages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def page(self, number: int | None) -> Page:
        """An image of the file.

        Args:
            number: None for the only one.
        Raises:
            ImageError: there is no such page, or the file has several and None was asked for.
        """
        count = len(self.pages)
        if number is None:
            if self.damage:
                raise ImageError(f"{self.source}: {self.damage}")
            if count > 1:
                raise several_images(self.source, str(count))
            number = 0
        if not 0 <= number < count:
            why = self.damage or f"has {count} page{'s' * (count > 1)}, counted from 0"
            raise ImageError(f"{self.source}: there is no page {number}: it {why}")
        return self.pages[number]

    def read(self, page: Page) -> Array:
        """The pixels of a page.

        Returns:
            (H, W, C), upright, in the order of the file's channels and of its type: red, green and
            blue for colours, 0 for black.
        Raises:
            ImageError: damaged, or its compression is unknown.
        """
        self.check_complete(page)
        with reporting(page.source), TiffLog().collecting():
            planes = [self._plane(page, number) for number in page.planes]
            pixels = np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0]
            return np.ascontiguousarray(upright(pixels, self.orientation(page)))

    def orientation(self, page: Page) -> int:
        """The tag Orientation, 1 to 8, in the meaning of EXIF."""
        value = page.series.keyframe.tags.valueof(274, 1)
        return value if value in range(1, 9) else 1

    def check_complete(self, page: Page) -> None:
        """Refuse a page of which the file does not hold all strips or tiles.

        tifffile would fill some of them with zeros, or make room for what a damaged header claims.
        """
        keyframe = page.series.keyframe
        end = keyframe.parent.filehandle.size
        for number in page.planes:
            if page.offset is not None:
                size = math.prod(page.plane_shape) * keyframe.dtype.itemsize
                parts = [(page.offset + number * size, size)]
                expected = 1
            else:
                plane = page.series.pages[number // page.inner]
                if plane is None:
                    raise ImageError(f"{page.source}: its plane {number} is missing")
                end = plane.parent.filehandle.size  # OME-TIFF may spread over several files
                parts = list(zip(plane.dataoffsets, plane.databytecounts, strict=False))
                expected = math.prod(keyframe.chunked)
            if len(parts) != expected or any(start + size > end for start, size in parts):
                height, width, _ = page.shape
                raise ImageError(
                    f"{page.source}: is damaged or cut off: it claims {width} x {height} pixels, "
                    f"and its {end} bytes do not hold all of them"
                )

    def mapped(self, page: Page) -> Array | None:
        """The file's own bytes as (H, W, C), without reading them; None if they are compressed."""
        if page.offset is None or len(page.planes) > 1 or not has_plain_pixels(page):
            return None
        with reporting(self.source):
            return channels_last(self._map(page, page.offset, page.planes[0]), page.axes)

    def store(self, page: Page) -> tuple[Any, Any]:
        """The series of ``page`` as an array of zarr, and its store, which the caller closes."""
        zarr = import_package("zarr", self.source)
        with reporting(self.source):
            store = page.series.aszarr(level=0)
            return zarr.open_array(store, mode="r"), store

    def _pages(self, log: TiffLog) -> list[Page]:
        image_series = [
            x for x in self._file.series if not (x.keyframe.is_reduced or x.keyframe.is_mask)
        ]
        image_series = image_series or list(self._file.series)
        if image_series and image_series[0].kind not in _SEVERAL_IMAGES:
            image_series = image_series[:1]
        pages = [page for series in image_series for page in self._in_series(series)]
        if pages and image_series[0].kind == "ome":
            pages = self._own(pages, log)
        if not pages:
            raise ImageError(f"{self.source}: is a TIFF without images")
        if len(image_series) > 1 and all(series.kind == "generic" for series in image_series):
            pages.sort(key=lambda page: page.series.pages[page.planes[0] // page.inner].index)
        if len(pages) == 1:
            return pages
        return [replace(page, source=f"{self.source} page {i}") for i, page in enumerate(pages)]

    def _own(self, pages: list[Page], log: TiffLog) -> list[Page]:
        """The pages of which this file holds a plane; all of them if it holds none."""
        # A plane that is missing belongs to another file if one could not be opened.
        elsewhere = log.has("failed to read") and not log.has("index out of range")

        def is_own(page: Page) -> bool:
            planes = [page.series.pages[number // page.inner] for number in page.planes]
            return any(
                not elsewhere if plane is None else plane.parent is self._file for plane in planes
            )

        held = [page for page in pages if is_own(page)]
        if held and len(held) < len(pages):
            text = (
                f"{self.source}: {len(pages) - len(held)} further images of its OME metadata are "
                "in other files, which are to be given too (said once)"
            )
            log_first_n(logging.WARNING, text, name=__name__)
        return held or pages

    def _in_series(self, series: Any) -> Iterator[Page]:
        plane = series.keyframe
        if any(level.shape == series.shape for level in series.levels[1:]):
            raise ImageError(
                f"{self.source}: has further images of its size in SubIFDs, where OME metadata "
                "expects smaller copies; save them as pages"
            )
        within = series.axes[-len(plane.axes) :]
        if plane.axes not in _PLANES or not within.endswith(plane.axes[-2:]):
            raise ImageError(
                f"{self.source}: has axes {series.axes}; expected planes of rows and columns (YX)"
            )
        self._check_colours(plane)
        # Samples that are labelled as something else than channels are planes, as those in volumes.
        inner = plane.axes.endswith("YX") and len(within) == 3 and within[0] not in "SC"
        page_axes = "YX" if inner else plane.axes
        axes = series.axes[: -len(page_axes)]
        lengths = series.shape[: len(axes)]
        numbers = np.arange(math.prod(lengths)).reshape(lengths)
        # Programs that know no axes give ImageJ, which shows 7 channels, its frames as channels.
        max_channels = _IMAGEJ_CHANNELS if series.kind == "imagej" else math.inf
        channels = [i for i, axis in enumerate(axes) if axis == "C" and lengths[i] <= max_channels]
        last = [*(i for i in range(len(axes)) if i not in channels), *channels]
        count = math.prod(lengths[i] for i in channels)
        rows, columns = (plane.shape[plane.axes.index(axis)] for axis in "YX")
        samples = plane.shape[plane.axes.index("S")] if "S" in page_axes else 1
        samples = 3 if plane.photometric.name == "PALETTE" else samples
        dtype = np.dtype(np.uint8) if plane.photometric.name == "PALETTE" else plane.dtype
        for planes in numbers.transpose(last).reshape(-1, max(count, 1)).tolist():
            shape = (rows, columns, samples * len(planes))
            depth = plane.shape[0] if inner else 1
            yield Page(self.source, series, tuple(planes), page_axes, depth, shape, dtype)

    def _check_colours(self, plane: Any) -> None:
        colours = getattr(plane.photometric, "name", str(plane.photometric))
        if colours not in _COLOURS or (colours == "YCBCR" and plane.compression.name != "JPEG"):
            raise ImageError(
                f"{self.source}: its colours are {colours}; expected grey, RGB or a palette"
            )
        if plane.dtype is None or plane.dtype.kind not in "buif":
            raise ImageError(f"{self.source}: has pixels of type {plane.dtype}; expected numbers")

    def _plane(self, page: Page, number: int) -> Array:
        """(H, W, S) of one plane."""
        keyframe = page.series.keyframe
        if page.offset is not None:
            pixels = self._map(page, page.offset, number)
        else:
            pixels = page.series.pages[number // page.inner].asarray()
            pixels = pixels[number % page.inner] if page.inner > 1 else pixels
        pixels = channels_last(pixels.reshape(page.plane_shape), page.axes)
        if keyframe.photometric.name == "PALETTE":
            palette = page.series.pages[number // page.inner].aspage().colormap
            return (palette.T[pixels[:, :, 0]] >> 8).astype(np.uint8)
        return _as_stored_intensities(pixels, keyframe)

    def _map(self, page: Page, offset: int, number: int) -> Array:
        keyframe = page.series.keyframe
        dtype = keyframe.dtype.newbyteorder(keyframe.parent.byteorder)
        size = math.prod(page.plane_shape) * dtype.itemsize
        path = keyframe.parent.filehandle.path
        return np.memmap(path, dtype, "r", offset + number * size, page.plane_shape)


def has_plain_pixels(page: Page) -> bool:
    """Whether the numbers in the file are those of the image: no palette, no white below black."""
    keyframe = page.series.keyframe
    return keyframe.photometric.name in ("MINISBLACK", "RGB", "YCBCR") and not _few_bits(keyframe)


def channels_last(pixels: Array, axes: str) -> Array:
    """A plane of axes YX, YXS or SYX → (H, W, S)."""
    if axes == "YX":
        return pixels[:, :, None]
    return np.moveaxis(pixels, 0, 2) if axes == "SYX" else pixels


def _few_bits(keyframe: Any) -> bool:
    return keyframe.dtype.kind == "b" or keyframe.bitspersample < 8


def _as_stored_intensities(pixels: Array, keyframe: Any) -> Array:
    """Numbers of a file → intensities: 0 is black, and few bits are spread to 255."""
    if _few_bits(keyframe):
        bits = 1 if keyframe.dtype.kind == "b" else keyframe.bitspersample
        pixels = pixels.astype(np.uint8) * np.uint8(255 // (2**bits - 1))
    if keyframe.photometric.name == "MINISWHITE" and pixels.dtype.kind == "u":
        return np.invert(pixels)
    return pixels


def upright(pixels: Array, orientation: int) -> Array:
    """(H, W, C) as stored → as seen, by an EXIF orientation of 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def check_levels(source: str, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Refuse a pyramid whose levels are not the same image in falling sizes.

    Args:
        shapes: (H, W, C) of each level, the full resolution first.
    Raises:
        ImageError: a level has another number of channels or other proportions (more than a pixel
            off), or is larger than the one before it.
    """
    height, width, channels = shapes[0]
    for level, (rows, columns, samples) in enumerate(shapes[1:], 1):
        smaller = rows <= shapes[level - 1][0] and columns <= shapes[level - 1][1]
        # Both sides are divided by the same factor and then rounded.
        alike = abs(rows * width - columns * height) <= height + width
        if samples != channels or not smaller or not alike:
            raise ImageError(
                f"{source}: the levels of its pyramid disagree: level 0 is {width} x {height} "
                f"pixels of {channels} channels, level {level} {columns} x {rows} of {samples}"
            )
