"""Convert masks between arrays, COCO's run-length encodings (RLE) and boxes.

An RLE is ``{"size": [height, width], "counts": ...}``.  Its runs go down the columns, alternating
between background and instance.  ``counts`` are compressed bytes as pycocotools makes them, the
same as text in JSON, or a list of the lengths.  If the runs do not fit the size, pycocotools reads
and writes beyond its memory, so an RLE from outside first passes :func:`check_rle`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from torch import Tensor

from instseg.masks.runs import expand

RLE = dict[str, Any]
Pixels = npt.NDArray[Any]


def encode(mask: Tensor | Pixels) -> RLE:
    """Compressed RLE, with bytes as ``counts``, of an (H, W) mask: bool, or numbers 0 and 1."""
    pixels = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    rle: RLE = mask_util.encode(np.asfortranarray(pixels, dtype=np.uint8))
    return rle


def decode(segmentation: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """(H, W) mask from the input of :func:`to_rle`; an RLE gives a mask of its own size."""
    pixels: npt.NDArray[np.uint8] = mask_util.decode(to_rle(segmentation, height, width))
    return pixels.view(np.bool_)


def to_rle(segmentation: Any, height: int, width: int) -> RLE:
    """Compressed RLE of an instance's segmentation in COCO's format.

    Args:
        segmentation: a list of one or more polygons ``[x, y, x, y, ...]``, or an RLE.  A compressed
            RLE is returned unchanged.
        height, width: of the image.
    """
    rle: RLE = segmentation
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, height, width)
    return rle


def as_text(rle: RLE) -> RLE:
    """A compressed RLE with text as ``counts`` for JSON, from one with bytes."""
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def rle_area(rle: RLE) -> int:
    """Number of pixels of a compressed RLE."""
    return int(mask_util.area(rle))


def rle_box(rle: RLE) -> list[float]:
    """The smallest box around a compressed RLE: x, y, width, height; zeros if it is empty."""
    box: list[float] = mask_util.toBbox(rle).tolist()
    return box


def ious(
    predicted: list[Any] | Pixels, instances: list[Any] | Pixels, crowds: Sequence[int] = ()
) -> npt.NDArray[np.float64]:
    """Intersection over union of each prediction with each instance of the ground truth.

    Args:
        predicted, instances: P and G compressed RLEs of one size, or boxes x, y, width, height.
        crowds: (G,) 1 divides by the area of the prediction only; empty means all 0.
    Returns:
        (P, G).
    """
    overlaps = mask_util.iou(predicted, instances, crowds or [0] * len(instances))
    return np.asarray(overlaps, dtype=np.float64).reshape(len(predicted), len(instances))


def check_rle(mask: Any, height: int, width: int) -> list[int]:
    """Lengths of the runs of an RLE, down the columns, alternating background and instance.

    Args:
        mask: ``{"size": [height, width], "counts": list or compressed text}``.
        height, width: of the image it belongs to.
    Raises:
        ValueError: it is no RLE, has another size, or its runs do not fill the image.
    """
    counts = mask.get("counts") if isinstance(mask, dict) else None
    if isinstance(counts, str):
        counts = _lengths(counts)
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("no mask can be read from it; expected an RLE with counts and size")
    size = mask.get("size")
    if size != [height, width] or any(type(side) is not int for side in size):
        raise ValueError(f"the mask is of {size}, its image of {[height, width]} (height, width)")
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise ValueError(f"the runs do not add up to {height} x {width} pixels")
    return counts


def _lengths(text: str) -> list[int] | None:
    """Lengths of the runs in COCO's compressed text; None if the text is malformed."""
    try:
        lengths: list[int] = expand([text.encode("ascii")])[0].tolist()
    except ValueError:
        return None
    return lengths
