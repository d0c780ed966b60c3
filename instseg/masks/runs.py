"""COCO's compressed text of run lengths, for many masks at once.

Each byte, less 48, holds five bits of a number, the lowest first.  The bit 32 says that another
byte follows, and the bit 16 of a number's last byte is its sign.  From a mask's fourth number on,
each is the difference from the last but one.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
_MOST_BYTES = 7
"""Largest number of bytes for a length: pycocotools holds the length of a run in 32 bits."""


def compress(lengths: Integers, counts: Integers) -> list[bytes]:
    """The text of each of N masks.

    Args:
        lengths: of the runs of all masks, one mask after the other.
        counts: (N,) runs of each mask.
    """
    _, number = numbered(counts)
    values = lengths.copy()
    later = np.flatnonzero(number > 2)
    values[later] -= lengths[later - 2]
    digits = np.zeros((len(values), _MOST_BYTES), dtype=np.uint8)
    byte_counts = np.zeros(len(values), dtype=np.int64)
    rows = np.arange(len(values))
    for position in range(_MOST_BYTES):
        bits = values & 31
        values >>= 5
        has_more = values != np.where(bits & 16, -1, 0)
        digits[rows, position] = (bits | has_more << 5) + 48
        byte_counts[rows] = position + 1
        rows, values = rows[has_more], values[has_more]
    text = digits[np.arange(_MOST_BYTES) < byte_counts[:, None]].tobytes()
    ends = _sums(byte_counts)[_sums(counts)].tolist()
    return [text[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


def expand(texts: Sequence[bytes]) -> tuple[Integers, Integers]:
    """``lengths`` and ``counts`` of :func:`compress` from the texts of N masks.

    Raises:
        ValueError: a text is malformed.
    """
    characters = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64) - 48
    final = (characters & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(final)[:-1] + 1]).astype(np.int64)
    sizes = np.diff(np.append(starts, len(characters)))
    text_ends = _sums(np.array([len(text) for text in texts], dtype=np.int64))
    all_complete = final[text_ends[1:][np.diff(text_ends) > 0] - 1].all()
    if not all_complete or characters.min(initial=0) < 0 or characters.max(initial=0) > 63:
        raise ValueError("the text of a mask is cut off or has other characters than COCO's")
    if not len(characters):
        return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
    if sizes.max() > _MOST_BYTES:
        raise ValueError("the text of a mask has a run of more than 32 bits")
    shifts = 5 * (np.arange(len(characters)) - np.repeat(starts, sizes))
    values = np.add.reduceat((characters & 31) << shifts, starts)
    last = np.flatnonzero(final)
    values -= (characters[last] & 16) << (shifts[last] + 1)
    counts = np.diff(_sums(final.astype(np.int64))[text_ends])
    return _undo_differences(values, counts), counts


def numbered(counts: Integers) -> tuple[Integers, Integers]:
    """For each run: the number of its mask, and the number of the run within the mask."""
    masks = np.repeat(np.arange(len(counts)), counts)
    return masks, np.arange(len(masks)) - _sums(counts)[masks]


def _undo_differences(values: Integers, counts: Integers) -> Integers:
    """Lengths of the runs from the numbers in the text."""
    masks, number = numbered(counts)
    lengths = values.copy()
    for parity in (0, 1):
        # The first number of each mask stands for itself and takes no part in the sums.
        summed = np.flatnonzero((number > 0) & (number % 2 == parity))
        sums = np.cumsum(values[summed])
        before = sums - values[summed]
        first = np.flatnonzero(number[summed] == 2 - parity)
        of_mask = np.cumsum(number[summed] == 2 - parity) - 1
        lengths[summed] = sums - before[first][of_mask] if len(summed) else sums
    return lengths


def _sums(counts: Integers) -> Integers:
    """(N + 1,) sums of the first 0, 1, ... N counts."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
