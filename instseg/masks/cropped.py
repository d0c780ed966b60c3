"""Masks that take the memory which their instances cover, not that of the image."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import find_objects
from torch import Tensor

from instseg.masks.rle import RLE, Pixels, ious, to_rle
from instseg.masks.runs import Integers, compress, expand, numbered

_PIXELS_AT_ONCE = 1 << 25
"""Unpacked at the same time, unless one mask covers more."""
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)
"""(256,) bits that are set in each byte."""


class CroppedMasks:
    """N masks of one image, each a bit per pixel of its tight box, on the CPU.

    A field of Detectron2's ``Instances``: it is indexed, concatenated and moved with them.

    Attributes:
        image_size: height and width.
    """

    def __init__(
        self, boxes: Integers, bits: npt.NDArray[np.uint8], image_size: tuple[int, int]
    ) -> None:
        """For the class methods, which make valid parts.

        Args:
            boxes: (N, 4) xyxy, tight and half-open; zeros for an empty mask.
            bits: of all boxes, one after the other, each from a new byte on; columns from the left,
                each from its top.
            image_size: height and width.
        """
        self.image_size = image_size
        self._boxes = boxes
        self._bits = bits
        counts = _byte_counts(boxes)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    @classmethod
    def of(cls, masks: "CroppedMasks | Tensor") -> "CroppedMasks":
        """``masks`` themselves if they are cropped, else from (N, H, W) bool."""
        return masks if isinstance(masks, CroppedMasks) else cls.from_dense(masks)

    @classmethod
    def from_dense(cls, masks: Tensor | Pixels) -> "CroppedMasks":
        """From (N, H, W) bool."""
        pixels = masks.cpu().numpy() if isinstance(masks, Tensor) else masks
        corners = np.zeros((len(pixels), 2), dtype=np.int64)
        height, width = pixels.shape[1:]
        return cls.from_crops(pixels, corners, (height, width))

    @classmethod
    def from_crops(
        cls,
        crops: Iterable[Pixels],
        corners: Pixels | Iterable[Sequence[int]],
        image_size: tuple[int, int],
    ) -> "CroppedMasks":
        """From parts of the image that hold the whole of a mask each.

        Args:
            crops: N times (h, w) bool of any size; cut to what is filled and inside the image.
            corners: (N, 2) whole numbers, x and y of their upper left pixels in the image.
            image_size: height and width.
        """
        pairs = zip(crops, corners, strict=True)
        return cls.from_parts(((int(x), int(y), crop) for crop, (x, y) in pairs), image_size)

    @classmethod
    def from_parts(
        cls, parts: Iterable[tuple[int, int, Pixels]], image_size: tuple[int, int]
    ) -> "CroppedMasks":
        """:meth:`from_crops` of (x, y, crop); each is packed before the next is asked for."""
        boxes, bits = [], bytearray()  # which grows without a second copy
        rows, columns = image_size
        for x, y, crop in parts:
            cut = crop[max(-y, 0) : max(rows - y, 0), max(-x, 0) : max(columns - x, 0)]
            x1, y1, width, height = cv2.boundingRect(cut.view(np.uint8)) if cut.size else [0] * 4
            if not width:
                boxes.append((0, 0, 0, 0))
                continue
            bits += np.packbits(cut[y1 : y1 + height, x1 : x1 + width].T).data
            x1, y1 = x1 + max(x, 0), y1 + max(y, 0)
            boxes.append((x1, y1, x1 + width, y1 + height))
        corners_of_boxes = np.array(boxes, dtype=np.int64).reshape(-1, 4)
        return cls(corners_of_boxes, np.frombuffer(bits, np.uint8), image_size)

    @classmethod
    def from_label_image(cls, labels: npt.NDArray[np.integer[Any]], count: int) -> "CroppedMasks":
        """From an (H, W) image in which the pixels of mask i have the value i + 1.

        Args:
            labels: 0 for none; values above ``count`` belong to no mask.
            count: of the masks; those without a pixel are empty.
        """
        slices = find_objects(labels, max_label=count) if count else []
        parts = (
            (slices_yx[1].start, slices_yx[0].start, labels[slices_yx] == number)
            if slices_yx
            else (0, 0, np.zeros((0, 0), dtype=np.bool_))
            for number, slices_yx in enumerate(slices, start=1)
        )
        return cls.from_parts(parts, (labels.shape[0], labels.shape[1]))

    @classmethod
    def from_rles(cls, rles: Sequence[RLE], image_size: tuple[int, int]) -> "CroppedMasks":
        """From RLEs of the image's size: compressed, as bytes or text, or lists of lengths.

        Raises:
            ValueError: an RLE is malformed, or its runs do not fill the image.
        """
        height, width = image_size
        packed = [to_rle(rle, height, width)["counts"] for rle in rles]
        texts = [text.encode("ascii") if isinstance(text, str) else text for text in packed]
        lengths, counts = expand(texts)
        masks, number = numbered(counts)
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        totals = np.diff(sums[np.cumsum(np.append(0, counts))])
        wrong = np.flatnonzero(totals != height * width)
        if len(wrong) or lengths.min(initial=0) < 0:
            raise ValueError(
                f"the runs of a mask do not add up to {height} x {width} pixels, the size of its "
                "image"
            )
        filled = np.flatnonzero((number % 2 == 1) & (lengths > 0))
        ends = sums[filled + 1] - masks[filled] * (height * width)
        return cls._from_runs(masks[filled], ends - lengths[filled], ends, len(rles), image_size)

    @classmethod
    def _from_runs(
        cls,
        masks: Integers,
        starts: Integers,
        ends: Integers,
        count: int,
        image_size: tuple[int, int],
    ) -> "CroppedMasks":
        """From runs of pixels, counted down the columns of the image, in order.

        Args:
            masks: (R,) number of the mask of each run.
            starts, ends: (R,) its first pixel, and the one after its last.
            count: of the masks.
            image_size: height and width.
        """
        boxes = np.zeros((count, 4), dtype=np.int64)
        if not len(masks):
            return cls(boxes, np.zeros(0, np.uint8), image_size)
        x1, y1 = np.divmod(starts, image_size[0])
        x2, y2 = np.divmod(ends - 1, image_size[0])
        first = np.flatnonzero(np.diff(masks, prepend=-1))
        owners = masks[first]
        # A run that goes on in the next column has the lowest pixel of a column and the uppermost.
        longer = x2 > x1
        boxes[owners, 0] = x1[first]
        boxes[owners, 1] = np.minimum.reduceat(np.where(longer, 0, y1), first)
        boxes[owners, 2] = np.maximum.reduceat(x2, first) + 1
        boxes[owners, 3] = np.maximum.reduceat(np.where(longer, image_size[0] - 1, y2), first) + 1
        left, top, _, bottom = boxes[masks].T
        starts_in_box = (x1 - left) * (bottom - top) + y1 - top
        ends_in_box = (x2 - left) * (bottom - top) + y2 - top + 1
        sizes = _byte_counts(boxes)
        parts = [np.zeros(0, np.uint8)]
        for group in _groups(sizes):
            runs = slice(*np.searchsorted(masks, (group.start, group.stop)))
            offsets = 8 * (np.cumsum(sizes[group]) - sizes[group])[masks[runs] - group.start]
            edges = np.stack([starts_in_box[runs] + offsets, ends_in_box[runs] + offsets], axis=1)
            lengths = np.diff(edges.ravel(), prepend=0, append=8 * sizes[group].sum())
            values = np.arange(len(lengths), dtype=np.uint8) % 2
            parts.append(np.packbits(np.repeat(values, lengths)))
        return cls(boxes, np.concatenate(parts), image_size)

    @property
    def boxes(self) -> Tensor:
        """(N, 4) int64 xyxy, tight and half-open; zeros for an empty mask."""
        return torch.from_numpy(self._boxes.copy())

    def __len__(self) -> int:
        return len(self._boxes)

    def __repr__(self) -> str:
        return f"CroppedMasks({len(self)} masks, image_size={self.image_size})"

    def __getitem__(self, index: Any) -> "CroppedMasks":
        """The chosen masks, without a copy if they are all; one alone too is a set of masks.

        Args:
            index: an int, a slice, or a tensor, an array or a list of ints or bools.
        Raises:
            IndexError: there is no such mask.
        """
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index if index.size else index.astype(np.int64)
        numbers = np.arange(len(self))
        chosen = np.atleast_1d(numbers[index])
        if np.array_equal(chosen, numbers):
            return self
        parts = [self._packed(number) for number in chosen.tolist()]
        bits = np.concatenate([np.zeros(0, np.uint8), *parts])
        return CroppedMasks(self._boxes[chosen], bits, self.image_size)

    @staticmethod
    def cat(parts: Sequence["CroppedMasks"]) -> "CroppedMasks":
        """The masks of all parts, at least one part.

        Raises:
            ValueError: the parts are of images of different size.
        """
        sizes = {part.image_size for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"expected masks of images of one size, found {sorted(sizes)}")
        boxes = np.concatenate([part._boxes for part in parts])
        return CroppedMasks(boxes, np.concatenate([part._bits for part in parts]), sizes.pop())

    def to(self, *_args: Any, **_options: Any) -> "CroppedMasks":
        """Itself, as it stays on the CPU."""
        return self

    def crop(self, index: int) -> tuple[int, int, npt.NDArray[np.bool_]]:
        """x and y of the upper left pixel of a mask's tight box, and the mask in it, (h, w)."""
        x1, y1, x2, y2 = self._boxes[index].tolist()
        width, height = x2 - x1, y2 - y1
        pixels = np.unpackbits(self._packed(index), count=width * height)
        return x1, y1, pixels.view(np.bool_).reshape(width, height).T

    def areas(self) -> npt.NDArray[np.int64]:
        """(N,) pixels of each mask."""
        ones = np.append(0, np.cumsum(_ONES[self._bits]))
        areas: npt.NDArray[np.int64] = np.diff(ones[self._ends], prepend=0)
        return areas

    def to_dense(self) -> Tensor:
        """(N, H, W) bool."""
        dense = np.zeros((len(self), *self.image_size), dtype=np.bool_)
        for index, mask in enumerate(dense):
            x, y, crop = self.crop(index)
            mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        return torch.from_numpy(dense)

    def to_label_image(
        self, top: int = 0, bottom: int | None = None
    ) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        """(H, W) 1 + index of the first mask at each pixel, 0 for none.

        uint32 if there are more masks than uint16 can count.

        Args:
            top, bottom: (bottom - top, W): only these rows, up to ``bottom`` - 1.
        """
        height, width = self.image_size
        bottom = height if bottom is None else bottom
        kind = np.uint16 if len(self) <= np.iinfo(np.uint16).max else np.uint32
        labels = np.zeros((bottom - top, width), dtype=kind)
        touching = np.flatnonzero((self._boxes[:, 1] < bottom) & (self._boxes[:, 3] > top))
        for index in touching[::-1].tolist():
            x, y, crop = self.crop(index)
            crop = crop[max(top - y, 0) : bottom - y]
            y = max(y - top, 0)
            labels[y : y + crop.shape[0], x : x + crop.shape[1]][crop] = index + 1
        return labels

    def to_rle(self) -> list[RLE]:
        """Compressed RLE of each mask, equal to :func:`instseg.masks.encode` of the dense mask."""
        rles: list[RLE] = []
        for group in _groups(_byte_counts(self._boxes)):
            lengths, counts = self._run_lengths(group)
            size = list(self.image_size)
            rles += [{"size": size.copy(), "counts": text} for text in compress(lengths, counts)]
        return rles

    def ious(self, other: "CroppedMasks") -> npt.NDArray[np.float64]:
        """(N, M) intersection over union of each mask with each of ``other``.

        Pixels are compared only where boxes overlap; two masks without any have 0.

        Raises:
            ValueError: the masks are of images of different size.
        """
        if other.image_size != self.image_size:
            raise ValueError(
                f"expected masks of images of one size, found {self.image_size} and "
                f"{other.image_size}"
            )
        return ious(self.to_rle(), other.to_rle())

    def shifted(self, x: int, y: int, image_size: tuple[int, int]) -> "CroppedMasks":
        """The same masks in a larger image, of which this image is a part.

        Args:
            x, y: upper left pixel of this image in the larger one.
            image_size: height and width of the larger one.
        Raises:
            ValueError: a mask would leave the larger image.
        """
        empty = self._boxes[:, 2:3] == 0
        boxes = np.where(empty, 0, self._boxes + [x, y, x, y])
        height, width = image_size
        if boxes.min(initial=0) < 0 or (boxes[:, 2:] > (width, height)).any():
            raise ValueError(
                f"masks moved by {x}, {y} leave an image of {width}x{height} pixels; expected one "
                "that holds them all"
            )
        return CroppedMasks(boxes, self._bits, image_size)

    def _packed(self, index: int) -> npt.NDArray[np.uint8]:
        """The bits of one mask."""
        return self._bits[self._starts[index] : self._ends[index]]

    def _run_lengths(self, group: slice) -> tuple[Integers, Integers]:
        """Lengths of the runs of consecutive masks over the image, and their number per mask.

        Lengths of background and of the mask alternate; each mask begins with background.
        """
        boxes = self._boxes[group]
        first_byte = self._starts[group.start]
        pixels = np.unpackbits(self._bits[first_byte : self._ends[group.stop - 1]])
        first_pixels = 8 * (self._starts[group] - first_byte)
        starts, ends = _runs_in_columns(pixels.view(np.bool_), boxes, first_pixels)
        masks = np.searchsorted(first_pixels, starts, side="right") - 1
        left, top, _, bottom = boxes[masks].T
        columns, rows = np.divmod(starts - first_pixels[masks], np.maximum(bottom - top, 1))
        ends = ends - starts
        starts = (left + columns) * self.image_size[0] + top + rows
        ends += starts
        # A run may go on from the bottom of one column to the top of the next.
        parted = (starts[1:] != ends[:-1]) | (masks[1:] != masks[:-1])
        begins = np.append(True, parted)[: len(starts)]
        ends = ends[np.append(parted, True)[: len(ends)]]
        return _lengths_over_image(masks[begins], starts[begins], ends, len(boxes), self.image_size)


def _byte_counts(boxes: Integers) -> Integers:
    """(N,) bytes that hold the bits of each box."""
    counts: Integers = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) + 7) // 8
    return counts


def _groups(byte_counts: Integers) -> Iterator[slice]:
    """Consecutive masks that are unpacked together."""
    start, ends = 0, np.cumsum(byte_counts)
    while start < len(ends):
        limit = ends[start] - byte_counts[start] + _PIXELS_AT_ONCE // 8
        stop = max(int(np.searchsorted(ends, limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _runs_in_columns(
    pixels: npt.NDArray[np.bool_], boxes: Integers, first_pixels: Integers
) -> tuple[Integers, Integers]:
    """First pixels of the runs in each column of each box, and the pixels after their last.

    Args:
        pixels: unpacked bits of all boxes.
        boxes: (N, 4).
        first_pixels: (N,) where in ``pixels`` each box begins.
    """
    widths = boxes[:, 2] - boxes[:, 0]
    masks, column = numbered(widths)
    tops = first_pixels[masks] + column * (boxes[:, 3] - boxes[:, 1])[masks]
    padded = np.zeros(len(pixels) + 2, dtype=np.bool_)
    padded[1:-1] = pixels
    begins, stops = padded[1:] > padded[:-1], padded[1:] < padded[:-1]
    begins[tops] = padded[tops + 1]
    stops[tops] = padded[tops]
    return np.flatnonzero(begins), np.flatnonzero(stops)


def _lengths_over_image(
    masks: Integers, starts: Integers, ends: Integers, count: int, image_size: tuple[int, int]
) -> tuple[Integers, Integers]:
    """:meth:`CroppedMasks._run_lengths` from what :meth:`CroppedMasks._from_runs` takes."""
    runs = np.bincount(masks, minlength=count)
    edges = np.full((2 * runs + 2).sum(), image_size[0] * image_size[1])
    first = np.cumsum(2 * runs + 2) - 2 * runs - 2
    edges[first] = 0
    _, number = numbered(runs)
    edges[first[masks] + 2 * number + 1] = starts
    edges[first[masks] + 2 * number + 2] = ends
    lengths = np.diff(edges, append=0)
    last = first + 2 * runs
    # Drops an empty run at the image's end, and the step from there to the next mask.
    is_run = np.ones(len(edges), dtype=np.bool_)
    is_run[last + 1] = False
    is_run[last] = (lengths[last] > 0) | (runs == 0)
    return lengths[is_run], 2 * runs + is_run[last]
