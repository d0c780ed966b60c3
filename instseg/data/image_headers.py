"""Check the depth, number and integrity of the images in a file, which Pillow does not check.

Pillow silently cuts colours of more than 8 bits to 8, takes the first image of a TIFF with several,
and ignores the checksums of a PNG.
"""

import itertools
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from instseg.data.intensity import too_deep
from instseg.data.tiff import several_images
from instseg.errors import ImageError

# The only formats that are opened: for an EPS file Pillow would run Ghostscript, which executes it.
FILE_TYPES = tuple("AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM QOI TGA TIFF WEBP".split())
# Twice Pillow's MAX_IMAGE_PIXELS; Pillow refuses larger images as decompression bombs.  At this
# size the masks of 100 instances, one byte per pixel, already need 18 GB.
MAX_PIXELS = 178_956_970
# So many pixels of three channels of 32 bits.
MAX_BYTES = 12 * MAX_PIXELS
MOST_COUNTED = 1000
"""Largest number of images of a TIFF that are counted."""
_MOST_OF_HEADER = 2**16
_SUBFILE_TYPE = 254
_BITS = 258
_WIDTH, _HEIGHT = 256, 257
_SUB_DIRECTORIES = 330
_DESCRIPTION = 270
_MOST_TAGS = 2**12
_BIG = 43
"""Third byte of a BigTIFF."""
_ONE_DIRECTORY = re.compile(r'^images=(?!1\s*$)\d|"truncated": true', re.MULTILINE)
"""Description of a stack by ImageJ, of more than one image, or by tifffile."""
_ASIDE = 0b101
"""Bits of a TIFF's NewSubfileType: a smaller copy of another image, or its transparency mask."""
_END_OF_JPEG = b"\xff\xd9"
_TAIL_BYTES = 64  # some programs pad files
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20  # bit in the first byte of a PNG chunk's name: pixels do not depend on the chunk


def check_size(width: int, height: int, source: str) -> None:
    """Refuse an image without pixels or with more than ``MAX_PIXELS``."""
    if not width or not height:
        raise ImageError(f"{source} is empty: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise too_large(f"{source}: {width}x{height} pixels")


def check_bytes(shape: tuple[int, int, int], dtype: np.dtype[Any], source: str) -> None:
    """Refuse pixels that take more than ``MAX_BYTES``.

    Args:
        shape: (H, W, C) of what would be read at once.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_BYTES:
        height, width, channels = shape
        raise ImageError(
            f"{source}: {width} x {height} pixels of {channels} channels of type {dtype.name} are "
            f"{size} bytes; at most {MAX_BYTES} are read at once: save it with tiles and give "
            "--tile, or save fewer channels"
        )


def too_large(what: str) -> ImageError:
    """The refusal of an image of more than ``MAX_PIXELS``; ``what`` names it and its size."""
    return ImageError(
        f"{what}; at most {MAX_PIXELS} pixels are accepted, and the network sees no more than "
        "INPUT.MAX_SIZE_TEST pixels a side, so shrink the image first"
    )


def check_whole(image: Image.Image, source: str) -> bool:
    """Refuse a file with several images, or with damage that a quick look shows.

    Args:
        image: opened by Pillow, its pixels not loaded yet.
        source: name of the image in error messages.
    Returns:
        True if the file is complete; False if only decoding it would show that.
    Raises:
        ImageError: a TIFF has several images, or a PNG a wrong checksum.
    """
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        _check_alone(image, source)
    file = getattr(image, "fp", None)
    if file is not None and image.format == "TIFF" and hides_images(image):
        position = file.tell()
        size = file.seek(0, os.SEEK_END)
        file.seek(position)
        held = size >= 2 * image.width * image.height * len(image.getbands())
        if held or _has_further_images(image):
            raise several_images(source, "several")
    if file is None or image.format not in ("JPEG", "PNG"):
        return False
    position = file.tell()
    is_complete = (
        _END_OF_JPEG in _tail(file) if image.format == "JPEG" else _check_png(file, source)
    )
    file.seek(position)
    return is_complete


def what_instead(start: bytes) -> str:
    """Guess the kind of a file that Pillow does not open, from its first bytes.

    Returns:
        the end of a sentence that begins with the file's name.
    """
    text = start.lstrip().lower()
    if text.startswith(b"<"):
        return "is HTML or XML text, not an image; did a download fail?"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an image; fetch it with `git lfs pull`"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return (
            "is a TIFF whose kind of pixels cannot be read, such as floats in colour, or it is cut "
            "off; expected 8 bits per channel, grey or colour"
        )
    return (
        f"is not an image in a known format ({', '.join(FILE_TYPES)}), or is cut off in its header"
    )


def check_depth(image: Image.Image, source: str) -> None:
    """Refuse more than 8 bits per channel, also where Pillow would silently cut them to 8.

    Args:
        image: opened by Pillow, its pixels not loaded yet.
        source: name of the image in error messages.
    Raises:
        ImageError: with the depth of the image.
    """
    depth = depth_of(image)
    if depth is not None:
        if image.mode[0] in "IF":
            depth += f", values up to {np.asarray(image).max()}"
        raise too_deep(source, depth)


def depth_of(image: Image.Image) -> str | None:
    """The kind of pixels of an image of more than 8 bits per channel; None for 8 bits.

    Args:
        image: opened by Pillow, its pixels not loaded yet.
    """
    if image.mode[0] in "IF":
        return f"mode {image.mode}"
    if _stores_16_bits(image):
        return f"{image.mode} with 16 bits per channel"
    bits = _avif_bits(image)
    return f"{image.mode} with {bits} bits per channel" if bits > 8 else None


def _stores_16_bits(image: Image.Image) -> bool:
    if image.format == "TIFF" and max(image.tag_v2.get(_BITS, (1,))) > 8:  # type: ignore[attr-defined]
        return True
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(arguments[0]) and not str(arguments[0]).startswith("BGR;16"):
            return True
        if tile[0].startswith("ppm") and isinstance(arguments[-1], int) and arguments[-1] > 255:
            return True
        if tile[0] == "jpeg2k" and _jpeg2000_bits(image.fp) > 8:  # type: ignore[attr-defined]
            return True
    return False


def _avif_bits(image: Image.Image) -> int:
    """Largest number of bits per channel in an AVIF file (AV1 in ISOBMFF, section 2.3.3).

    Each image of the file has a box ``av1C`` of codec settings: version, profile, then two bits
    about depth.  Gives 8 for other formats.
    """
    file = getattr(image, "fp", None)
    if image.format != "AVIF" or file is None:
        return 8
    position = file.tell()
    file.seek(0)
    settings = re.findall(rb"av1C\x81.(.)", file.read(_MOST_OF_HEADER), re.DOTALL)
    file.seek(position)
    flags = [(bits[0] >> 6 & 1, bits[0] >> 5 & 1) for bits in settings]
    return max((8 + 2 * deep + 2 * twelve for deep, twelve in flags), default=8)


def _jpeg2000_bits(file: BinaryIO) -> int:
    """Largest number of bits per channel in a JPEG 2000 file (ISO 15444-1, A.5.1)."""
    file.seek(_jpeg2000_stream(file) + 40)
    channels = file.read(3 * int.from_bytes(file.read(2), "big"))
    return max((1 + (bits & 127) for bits in channels[::3]), default=0)


def _jpeg2000_stream(file: BinaryIO) -> int:
    """Offset of the image data: 0, or inside one of the file's boxes (ISO 15444-1, I.4)."""
    file.seek(0)
    if file.read(2) == b"\xff\x4f":
        return 0
    offset = 0
    while True:
        file.seek(offset)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if length == 1:  # the real length follows
            length, header = int.from_bytes(head[8:], "big"), 16
        if kind == b"jp2c":
            return offset + header
        if length < header:
            raise ValueError(f"its box {kind!r} is of {length} bytes")
        offset += length


def count_images(image: Image.Image) -> int:
    """The number of images in a TIFF, up to a limit; smaller copies and masks do not count."""
    current, count = image.tell(), 0
    for index in itertools.count():
        try:
            image.seek(index)
        except EOFError:
            break
        count += not image.tag_v2.get(_SUBFILE_TYPE, 0) & _ASIDE  # type: ignore[attr-defined]
        if count > MOST_COUNTED:
            break
    image.seek(current)
    return count


def hides_images(image: Image.Image) -> bool:
    """Whether a TIFF may have more images than Pillow sees.

    ImageJ writes a stack above 4 GB with a single directory, and so does tifffile if told to.
    Other programs keep further images in SubIFDs.
    """
    if getattr(image, "is_animated", False):
        return False
    text = str(image.tag_v2.get(_DESCRIPTION, ""))  # type: ignore[attr-defined]
    return _ONE_DIRECTORY.search(text) is not None or _has_further_images(image)


def _has_further_images(image: Any) -> bool:
    """Whether SubIFDs of a TIFF hold an image of its size or larger, which is no mask or copy."""
    file = image.fp
    position = file.tell()
    try:
        file.seek(0)
        start = file.read(8)
        if start[2] == _BIG:
            start += file.read(8)
            offsets = _big_sub_directories(file, start)
        else:
            offsets = image.tag_v2.get(_SUB_DIRECTORIES, ())
        for offset in (offsets if isinstance(offsets, tuple) else (offsets,))[:MOST_COUNTED]:
            directory = TiffImagePlugin.ImageFileDirectory_v2(start)
            file.seek(offset)
            directory.load(file)
            aside = directory.get(_SUBFILE_TYPE, 0) & _ASIDE
            width, height = directory.get(_WIDTH, 0), directory.get(_HEIGHT, 0)
            if not aside and width >= image.width and height >= image.height:
                return True
        return False
    finally:
        file.seek(position)


def _big_sub_directories(file: BinaryIO, start: bytes) -> tuple[int, ...]:
    """Places of the SubIFDs of a BigTIFF's first image, in a type that Pillow does not know."""
    file.seek(*struct.unpack("<Q", start[8:]))
    (count,) = struct.unpack("<Q", file.read(8))
    for _ in range(min(count, _MOST_TAGS)):
        tag, _, length, value = struct.unpack("<HHQQ", file.read(20))
        if tag == _SUB_DIRECTORIES and length > 1:
            file.seek(value)
            length = min(length, MOST_COUNTED)
            return struct.unpack(f"<{length}Q", file.read(8 * length))
        if tag == _SUB_DIRECTORIES:
            return (value,)
    return ()


def _check_alone(image: Image.Image, source: str) -> None:
    """Refuse a TIFF of several images."""
    count = count_images(image)
    if count > 1:
        number = f"more than {MOST_COUNTED}" if count > MOST_COUNTED else str(count)
        raise several_images(source, number)


def _tail(file: BinaryIO) -> bytes:
    file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read()


def _check_png(file: BinaryIO, source: str) -> bool:
    """Refuse a PNG with a wrong checksum in a chunk that pixels depend on.

    Returns:
        whether the file has all its chunks, up to the last.
    """
    file.seek(len(_PNG_START))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return True
        data, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            return False
        intact = zlib.crc32(data, zlib.crc32(kind)) == int.from_bytes(checksum, "big")
        if not intact and not kind[0] & _ANCILLARY:
            name = kind.decode("ascii", errors="backslashreplace")
            raise ImageError(f"{source}: is damaged: the checksum of its chunk {name} is wrong")
    return False


def first_bytes(path: Path) -> bytes:
    """Enough of a file for :func:`what_instead`."""
    with open(path, "rb") as file:
        return file.read(64)
