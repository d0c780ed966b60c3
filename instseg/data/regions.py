"""Read rectangles of images that are too large to be read at once.

TIFF files are mapped into memory where they are not compressed, and else decoded by the tiles or
strips that a rectangle touches; zarr arrays and OME-Zarr images by their chunks.  Files of other
formats are read whole.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from detectron2.utils.logger import log_first_n

from instseg.data.image_headers import MAX_PIXELS, check_bytes
from instseg.data.images import has_pillow_colours, is_tiff, read_pixels
from instseg.data.tiff import (
    Page,
    TiffImages,
    channels_last,
    check_levels,
    has_plain_pixels,
)
from instseg.data.tiff_errors import import_package, reporting
from instseg.errors import ImageError

Array = npt.NDArray[Any]

_LARGEST_CHUNK = 2**28
"""Bytes of a tile or strip; with larger ones an image is read whole, and zarr is refused."""
_SAMPLES = 2**24
"""Pixels of three channels of 16 bits."""
_MOST_PLAIN = 4
"""Largest number of channels of an array of zarr without axes."""
_SAMPLE_SIDE = 512
# Filters and compressors of zarr's format 2.  Others, such as "pickle", could execute code.
_CODECS_2 = frozenset(
    "adler32 bitround blosc bz2 crc32 crc32c delta fixedscaleoffset fletcher32 gzip lz4 lzma "
    "packbits quantize shuffle zfpy zlib zstd".split()
)
_CODECS_3 = frozenset("blosc bytes crc32c gzip sharding_indexed transpose zstd".split())
"""Those of format 3."""


class Regions(Protocol):
    """An image that is read by rectangles; the user closes it, or uses it as a context manager.

    Attributes:
        shape: (H, W, C) of the full resolution, upright.
        dtype: of its pixels.
        alpha: the last of four channels is transparency.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    alpha: bool

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Array:
        """The pixels of rows ``y0`` to ``y1`` - 1 and columns ``x0`` to ``x1`` - 1.

        Args:
            y0, y1, x0, x1: inside the image.
        Returns:
            (y1 - y0, x1 - x0, C), contiguous, as :func:`instseg.data.images.read_pixels` has them.
        Raises:
            ImageError: that part of the file is damaged.
        """

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Regions": ...

    def __exit__(self, *exception: object) -> None: ...


class _Regions:
    """Regions of anything that can be indexed."""

    def __init__(
        self,
        source: str,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        get: Callable[[slice, slice], Array],
        *,
        alpha: bool = False,
        files: ExitStack | None = None,
    ) -> None:
        """
        Args:
            source: name of the image in messages.
            get: rows, columns → (h, w, C).
            files: closed in the end.
        """
        self.shape, self.dtype, self.alpha = shape, dtype.newbyteorder("="), alpha
        self._source, self._get, self._files = source, get, files or ExitStack()

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Array:
        height, width, _ = self.shape
        if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
            raise ValueError(f"rows {y0}:{y1}, columns {x0}:{x1} are not in {width} x {height}")
        with reporting(self._source):
            pixels = self._get(slice(y0, y1), slice(x0, x1))
            return np.ascontiguousarray(pixels, dtype=self.dtype)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "_Regions":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_regions(path: str | os.PathLike[str], page: int | None = None) -> Regions:
    """Open an image to read it by rectangles, at full resolution.

    Args:
        path: an image file; a folder of zarr: an array of axes YX, YXC (at most 4 channels) or an
            image of OME-Zarr (0.4 or 0.5, without further axes longer than 1).
        page: of a stack, counted from 0.
    Raises:
        ImageError: it cannot be read, has several pages and ``page`` is None, its levels of a
            pyramid disagree, or it is of a format that is read whole and has too many pixels.
    """
    if os.path.isdir(path):
        return _open_zarr(Path(path))
    with reporting(str(path)):
        in_parts = is_tiff(path) and not has_pillow_colours(path, page)
    if in_parts:
        return _open_tiff(path, page)
    return _whole(str(path), read_pixels(path, page=page))


def sample(regions: Regions, limit: int = _SAMPLES) -> Array:
    """Pixels that stand for the whole image, such as for its percentiles.

    They are all pixels of an image of at most ``limit``, or fewer if it has more than 3 channels or
    16 bits; else those of squares of 512 x 512, evenly spread over the full resolution (not of a
    lower one, whose means have no extremes).

    Returns:
        (N, 1, C).
    """
    height, width, channels = regions.shape
    bytes_of_pixel = max(channels * regions.dtype.itemsize, 6)
    limit = max(limit * 6 // bytes_of_pixel, _SAMPLE_SIDE**2)
    if height * width <= limit:
        return regions.read(0, height, 0, width).reshape(-1, 1, channels)
    side = min(_SAMPLE_SIDE, height, width)
    count = max(limit // side**2, 1)
    rows = min(max(round(math.sqrt(count * height / width)), 1), count, height // side)
    columns = min(max(count // rows, 1), width // side)
    tops = np.linspace(0, height - side, rows).astype(int).tolist()
    lefts = np.linspace(0, width - side, columns).astype(int).tolist()
    squares = [regions.read(y, y + side, x, x + side) for y in tops for x in lefts]
    return np.concatenate([square.reshape(-1, 1, channels) for square in squares])


def _whole(source: str, pixels: Array, *, alpha: bool = True) -> _Regions:
    height, width, channels = pixels.shape
    shape = (height, width, channels)
    return _Regions(source, shape, pixels.dtype, lambda y, x: pixels[y, x], alpha=alpha)


def _open_tiff(path: str | os.PathLike[str], number: int | None) -> _Regions:
    with ExitStack() as files:
        file = files.enter_context(TiffImages(path))
        page = file.page(number)
        file.check_complete(page)
        check_levels(file.source, [_shape_of(level) for level in page.series.levels])
        get = _tiff_getter(file, page, files)
        if get is not None:
            dtype, open_files = page.dtype, files.pop_all()
            return _Regions(file.source, page.shape, dtype, get, alpha=page.alpha, files=open_files)
        if page.shape[0] * page.shape[1] > MAX_PIXELS:
            raise ImageError(
                f"{file.source}: {page.shape[1]} x {page.shape[0]} pixels in one strip or in "
                "colours that are not read by parts; save it with tiles, grey or RGB"
            )
        check_bytes(page.shape, page.dtype, file.source)
        return _whole(file.source, file.read(page), alpha=page.alpha)


def _tiff_getter(
    file: TiffImages, page: Page, files: ExitStack
) -> Callable[[slice, slice], Array] | None:
    """Reads rectangles of a page; None if it can only be read whole.

    Args:
        files: what has to be closed in the end is added to it.
    """
    if file.orientation(page) != 1 or not has_plain_pixels(page):
        return None
    mapped = file.mapped(page)
    if mapped is not None:
        return lambda y, x: mapped[y, x]
    if math.prod(page.series.keyframe.chunks) * page.dtype.itemsize > _LARGEST_CHUNK:
        return None
    array, store = file.store(page)
    files.callback(store.close)
    axes = page.axes

    def get(y: slice, x: slice) -> Array:
        parts = (slice(None), y, x) if axes == "SYX" else (y, x)
        planes = [np.asarray(array[(*page.index(plane), *parts)]) for plane in page.planes]
        return np.concatenate([channels_last(plane, axes) for plane in planes], axis=2)

    return get


def _shape_of(level: Any) -> tuple[int, int, int]:
    """(H, W, all the rest) of a level of a pyramid."""
    height, width = (level.shape[level.axes.index(axis)] for axis in "YX")
    return height, width, math.prod(level.shape) // max(height * width, 1)


def _open_zarr(path: Path) -> _Regions:
    source = str(path)
    zarr = import_package("zarr", source)
    with reporting(source):
        node = zarr.open(path, mode="r")
        if isinstance(node, zarr.Array):
            levels, axes = [node], "YX" if node.ndim == 2 else "YXC"
            if node.ndim not in (2, 3) or (node.ndim == 3 and node.shape[2] > _MOST_PLAIN):
                raise ImageError(
                    f"{source}: is an array of shape {node.shape}; expected (height, width), "
                    f"(height, width, at most {_MOST_PLAIN} channels) or an image of OME-Zarr"
                )
        else:
            levels, axes = _multiscales(node, source)
        shapes = [_yxc(level.shape, axes, source) for level in levels]
        for level in levels:
            _check_codecs(level, source)
    check_levels(source, shapes)
    array = levels[0]
    _tell_missing_chunks(array, source)
    if math.prod(array.chunks) * array.dtype.itemsize > _LARGEST_CHUNK:
        raise ImageError(
            f"{source}: has chunks of {' x '.join(map(str, array.chunks))} pixels of type "
            f"{array.dtype}; expected at most {_LARGEST_CHUNK} bytes in a chunk: save it "
            "with smaller ones, such as 1024 x 1024"
        )

    def get(y: slice, x: slice) -> Array:
        chosen = {"Y": y, "X": x, "C": slice(None)}
        pixels = np.asarray(array[tuple(chosen.get(axis, 0) for axis in axes)])
        if "C" not in axes:
            return pixels[:, :, None]
        kept_axes = [axis for axis in axes if axis in chosen]
        return pixels.transpose([kept_axes.index(axis) for axis in "YXC"])

    return _Regions(source, shapes[0], array.dtype, get, alpha=axes == "YXC")


def _tell_missing_chunks(array: Any, source: str) -> None:
    """Warn of chunks, or of shards of several chunks, that are not there.

    In zarr they stand for one value, so they are no fault of the file by themselves; a download
    that ended early leaves the same.
    """
    shards = getattr(array, "shards", None)
    stored = shards or array.chunks
    total = math.prod(-(-size // part) for size, part in zip(array.shape, stored, strict=True))
    with reporting(source):
        missing = total - array.nchunks_initialized * math.prod(array.chunks) // math.prod(stored)
    if missing:
        parts = "shards" if shards else "chunks"
        text = (
            f"{source}: {missing} of its {total} {parts} are not there, and their pixels "
            f"count as {array.fill_value}: if they should be there, copy the folder again"
        )
        log_first_n(logging.WARNING, text, name=__name__, key="message")


def _multiscales(group: Any, source: str) -> tuple[list[Any], str]:
    """Arrays of an OME-Zarr image, the full resolution first, and their axes such as TCZYX."""
    attributes = dict(group.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        raise ImageError(
            f"{source}: is a group of zarr without multiscales; give the folder of an OME-Zarr "
            "image or of an array"
        )
    levels = [group[entry["path"]] for entry in scales[0]["datasets"]]
    names = [x["name"] if isinstance(x, dict) else x for x in scales[0].get("axes", "tczyx")]
    axes = "".join(str(name)[:1].upper() for name in names)
    if len(axes) != levels[0].ndim or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
        raise ImageError(
            f"{source}: has axes {axes} and an array of shape {levels[0].shape}; expected one axis "
            "per dimension, Y and X among them"
        )
    return levels, axes


def _yxc(shape: tuple[int, ...], axes: str, source: str) -> tuple[int, int, int]:
    lengths = dict(zip(axes, shape, strict=True))
    longer = {axis: n for axis, n in lengths.items() if axis not in "YXC" and n > 1}
    if longer:
        raise ImageError(
            f"{source}: has {longer} positions along further axes; expected one image: save one "
            "position"
        )
    return lengths["Y"], lengths["X"], lengths.get("C", 1)


def _check_codecs(array: Any, source: str) -> None:
    """Refuse types and codecs that are no plain numbers; some of them could execute code."""
    # The package zarr has metadata from its version 3 on.
    metadata = (
        array.metadata.to_dict()
        if hasattr(array, "metadata")
        else {
            "zarr_format": 2,
            "filters": array.filters,
            "compressor": array.compressor,
        }
    )
    if metadata["zarr_format"] == 2:
        codecs = [*(metadata.get("filters") or ()), metadata.get("compressor")]
        names, known = [x["id"] for x in map(_as_dict, codecs) if x], _CODECS_2
    else:
        names, known = list(_names(metadata["codecs"])), _CODECS_3
    unknown = [name for name in names if name not in known]
    if unknown or array.dtype.kind not in "buif":
        what = f"codec {unknown[0]}" if unknown else f"type {array.dtype}"
        raise ImageError(f"{source}: its {what} is not read; expected plain numbers")


def _as_dict(codec: Any) -> dict[str, Any]:
    return codec if isinstance(codec, dict) else codec.get_config() if codec is not None else {}


def _names(codecs: Any) -> Iterator[str]:
    """Names of codecs of zarr's format 3 and of those inside them."""
    for codec in codecs:
        codec = codec if isinstance(codec, dict) else codec.to_dict()
        yield codec["name"]
        inner = codec.get("configuration") or {}
        for key in ("codecs", "index_codecs"):
            yield from _names(inner.get(key, ()))
