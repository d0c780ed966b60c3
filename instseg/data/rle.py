"""Masks as COCO's run-length encodings, checked before pycocotools sees them.

pycocotools reads and writes beyond its memory where the runs of an encoding do not fit its size.
"""

from typing import Any


def check_rle(mask: Any, height: int, width: int) -> list[int]:
    """Lengths of the runs of an encoding, column by column, of background and object in turn.

    Args:
        mask: ``{"size": [height, width], "counts": list or compressed text}``.
        height, width: of the picture it belongs to.
    Raises:
        ValueError: it is no such encoding, of another size, or its runs do not fill the picture.
    """
    counts = mask.get("counts") if isinstance(mask, dict) else None
    if isinstance(counts, str):
        counts = _runs(counts)
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("no mask can be read from it; expected an RLE with counts and size")
    size = mask.get("size")
    if size != [height, width] or any(type(side) is not int for side in size):
        raise ValueError(f"the mask is of {size}, its picture of {[height, width]} (height, width)")
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise ValueError(f"the runs do not add up to {height} x {width} pixels")
    return counts


def _runs(text: str) -> list[int] | None:
    """Lengths of the runs in COCO's compressed text; None if it is not such a text.

    Five bits a character, the lowest first, from "0" on; 32 says that more follow, 16 in the last
    one is the sign.  From the fourth on, numbers are differences from the one before the last.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts
