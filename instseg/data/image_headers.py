"""What a file says of its image besides the pixels, and what Pillow leaves unchecked.

Pillow cuts colours of more than 8 bits to 8 without a word, takes the first image of a TIFF that
holds many, and decodes a PNG without a look at its checksums.
"""

import itertools
import os
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from instseg.errors import ImageError

# Named one by one because Pillow would also run Ghostscript on an EPS file, that is, execute it.
FILE_TYPES = tuple("AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM QOI TGA TIFF WEBP".split())
_MOST_COUNTED = 1000
_MOST_OF_HEADER = 2**16
_SUBFILE_TYPE = 254
_ASIDE = 0b101
"""Bits of a TIFF's NewSubfileType: a smaller copy of another image, a mask of its transparency."""
_END_OF_JPEG = b"\xff\xd9"
_TAIL_BYTES = 64  # some programs pad files
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20  # in the first byte of a PNG chunk's name; nothing depends on such a chunk


def check_whole(image: Image.Image, source: str) -> bool:
    """Refuse a file that holds several images, or is damaged as far as that can be told quickly.

    Args:
        image: opened by Pillow, its pixels not loaded yet.
        source: what error messages call it.
    Returns:
        whether the file is known to be whole; where it is not, only decoding it can tell.
    Raises:
        ImageError: a TIFF of several images, a PNG with a wrong checksum.
    """
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        _check_alone(image, source)
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("JPEG", "PNG"):
        return False
    place = file.tell()
    whole = _END_OF_JPEG in _tail(file) if image.format == "JPEG" else _check_png(file, source)
    file.seek(place)
    return whole


def what_instead(start: bytes) -> str:
    """What a file is that begins so and that Pillow does not open, as the end of a sentence."""
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
    """Refuse more than 8 bits per channel, also where Pillow would cut them to 8 without a word.

    Args:
        image: opened by Pillow, its pixels not loaded yet.
        source: what error messages call it.
    Raises:
        ImageError: with what was found.
    """
    if image.mode[0] in "IF":
        found = f"mode {image.mode}, values up to {np.asarray(image).max()}"
    elif _stores_16_bits(image):
        found = f"{image.mode} with 16 bits per channel"
    elif (bits := _avif_bits(image)) > 8:
        found = f"{image.mode} with {bits} bits per channel"
    else:
        return
    raise ImageError(
        f"{source}: expected 8 bits per channel, found {found}; scale it to 0 to 255 and save it "
        "as an 8-bit image"
    )


def _stores_16_bits(image: Image.Image) -> bool:
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
    """Most bits of a channel in an AVIF file (AV1 in ISOBMFF, section 2.3.3); 8 of other files.

    Every image in it has a box of settings of its coder, ``av1C``: its version, its profile, then
    two bits about depth.
    """
    file = getattr(image, "fp", None)
    if image.format != "AVIF" or file is None:
        return 8
    place = file.tell()
    file.seek(0)
    settings = re.findall(rb"av1C\x81.(.)", file.read(_MOST_OF_HEADER), re.DOTALL)
    file.seek(place)
    high = [(bits[0] >> 6 & 1, bits[0] >> 5 & 1) for bits in settings]
    return max((8 + 2 * deep + 2 * twelve for deep, twelve in high), default=8)


def _jpeg2000_bits(file: BinaryIO) -> int:
    """Most bits of a channel in a JPEG 2000 file (ISO 15444-1, A.5.1)."""
    file.seek(_jpeg2000_stream(file) + 40)
    channels = file.read(3 * int.from_bytes(file.read(2), "big"))
    return max((1 + (bits & 127) for bits in channels[::3]), default=0)


def _jpeg2000_stream(file: BinaryIO) -> int:
    """Where the image proper begins: with the file, or in one of its boxes (ISO 15444-1, I.4)."""
    file.seek(0)
    if file.read(2) == b"\xff\x4f":
        return 0
    place = 0
    while True:
        file.seek(place)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if length == 1:  # the length proper follows
            length, header = int.from_bytes(head[8:], "big"), 16
        if kind == b"jp2c":
            return place + header
        if length < header:
            raise ValueError(f"its box {kind!r} is of {length} bytes")
        place += length


def _check_alone(image: Image.Image, source: str) -> None:
    """Refuse a TIFF of several images; smaller copies and masks of the first do not count."""
    current, count = image.tell(), 0
    for index in itertools.count():
        try:
            image.seek(index)
        except EOFError:
            break
        count += not image.tag_v2.get(_SUBFILE_TYPE, 0) & _ASIDE  # type: ignore[attr-defined]
        if count > _MOST_COUNTED:
            break
    image.seek(current)
    if count > 1:
        found = f"more than {_MOST_COUNTED}" if count > _MOST_COUNTED else str(count)
        raise ImageError(
            f"{source}: is a TIFF of {found} images; expected one in a file: split it, for example "
            "with `magick STACK.tif PAGE_%03d.tif`, and use the files that you need"
        )


def _tail(file: BinaryIO) -> bytes:
    file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read()


def _check_png(file: BinaryIO, source: str) -> bool:
    """Refuse a PNG in which a chunk that pixels depend on has another checksum than it says.

    Returns:
        whether its chunks go on to the last.
    """
    file.seek(len(_PNG_START))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return True
        data, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            return False
        sound = zlib.crc32(data, zlib.crc32(kind)) == int.from_bytes(checksum, "big")
        if not sound and not kind[0] & _ANCILLARY:
            name = kind.decode("ascii", errors="backslashreplace")
            raise ImageError(f"{source}: is damaged: the checksum of its chunk {name} is wrong")
    return False


def first_bytes(path: Path) -> bytes:
    """Enough of a file for :func:`what_instead`."""
    with open(path, "rb") as file:
        return file.read(64)
