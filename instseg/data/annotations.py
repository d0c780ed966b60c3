"""Bring an annotation of a record to the form that training and every evaluator reads."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.structures import BoxMode

from instseg.data.findings import Kind
from instseg.data.readers.coco_check import place_problems, polygon_problems, usable_polygons
from instseg.data.readers.coco_forms import box_of, flat_polygons
from instseg.data.readers.json_files import crowd_flag, whole
from instseg.errors import short
from instseg.masks import check_rle, encode, rle_box, to_rle

Annotation = dict[str, Any]
Problem = tuple[Kind, str]
_MODES = tuple(int(mode) for mode in BoxMode)
_NUMBERS = frozenset((int, float))
_SUPPORTED = "polygons [[x, y, x, y, ...], ...], an RLE or an array of the size of the image"


class Fault(Exception):
    """An annotation or record that no model can use.

    Attributes:
        kind: of the finding; the text says where and why.
    """

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def standard_annotation(
    given: Any, height: int, width: int, classes: list[str] | None
) -> tuple[Annotation, list[Problem]]:
    """A copy of an annotation in Detectron2's standard form, and its remaining problems.

    ``bbox`` is four floats in pixels, and ``category_id`` and ``iscrowd`` are int.
    ``segmentation`` is polygons of floats or a compressed RLE of the image's size; the key is
    missing if there is no mask.

    Args:
        given: anything that a registered function put into a record.
        height, width: of its image.
        classes: names in the order of ``category_id``; None if unknown.
    Raises:
        Fault: no model can use the annotation.
    """
    if not isinstance(given, Mapping):
        raise Fault(Kind.FORMAT, f"it is {short(given)}; expected a dict")
    annotation = {str(key): value for key, value in given.items()}
    problems: list[Problem] = []
    annotation["category_id"] = _category(given, classes)
    crowd = annotation["iscrowd"] = crowd_flag(given.get("iscrowd", 0))
    if type(crowd) is not int or crowd not in (0, 1):
        raise Fault(Kind.FORMAT, f"iscrowd is {short(crowd)}; expected 0 or 1")
    mask, mask_problems = _mask(annotation.pop("segmentation", None), height, width)
    problems += mask_problems
    if mask is not None:
        annotation["segmentation"] = mask
    if given.get("bbox") is None:
        box = rle_box(mask) if isinstance(mask, dict) else box_of(mask, height, width)
        if box is None:
            raise Fault(Kind.FORMAT, "it has neither bbox nor segmentation")
        annotation["bbox"], annotation["bbox_mode"] = [float(v) for v in box], BoxMode.XYWH_ABS
    else:
        mode = given.get("bbox_mode")
        annotation["bbox"], annotation["bbox_mode"] = _box(given["bbox"], mode, height, width)
    problems += _box_problems(annotation, height, width)
    points = given.get("keypoints")
    if points is not None:
        # A copy, since Detectron2 writes into it.
        annotation["keypoints"] = list(points.tolist() if hasattr(points, "tolist") else points)
    return annotation, problems


def _category(given: Mapping[str, Any], classes: list[str] | None) -> int:
    key = whole(given.get("category_id"))
    if type(key) is not int:
        text = f"category_id is {short(key)}; expected a whole number from 0"
        raise Fault(Kind.UNKNOWN_CATEGORY, text)
    if classes is not None and not 0 <= key < len(classes):
        hint = "; do they count from 1?" if key == len(classes) else ""
        names = ", ".join(classes[:10])
        text = (
            f"category_id is {key}; the data set has {len(classes)} thing_classes ({names}), so "
            f"expected 0 to {len(classes) - 1}{hint}"
        )
        raise Fault(Kind.UNKNOWN_CATEGORY, text)
    return key


def _box(given: Any, mode: Any, height: int, width: int) -> tuple[list[float], BoxMode]:
    """Four floats in pixels, and their mode."""
    values = given.tolist() if hasattr(given, "tolist") else given
    number = whole(mode)
    if not isinstance(number, int) or number not in _MODES:
        raise Fault(
            Kind.FORMAT,
            f"bbox_mode is {short(mode)}; expected BoxMode.XYXY_ABS for [x1, y1, x2, y2] or "
            "BoxMode.XYWH_ABS for [x, y, width, height]",
        )
    mode = BoxMode(number)
    count = 5 if mode is BoxMode.XYWHA_ABS else 4
    if not isinstance(values, list | tuple) or len(values) != count or not _are_numbers(values):
        raise Fault(Kind.FORMAT, f"bbox is {short(given)}; expected {count} numbers")
    box = [float(value) for value in values]
    text = f"bbox is {[round(value, 3) for value in box]} in BoxMode.{mode.name}"
    if not all(map(math.isfinite, box)):
        raise Fault(Kind.FORMAT, f"{text}; expected finite numbers")
    if mode is BoxMode.XYWHA_ABS:
        box, mode = BoxMode.convert(box, mode, BoxMode.XYXY_ABS), BoxMode.XYXY_ABS
    across, down = box[2:]
    if mode in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
        across, down = box[2] - box[0], box[3] - box[1]
    if across < 0 or down < 0:
        raise Fault(Kind.INVERTED_BOX, f"{text}, of negative size; do box and bbox_mode agree?")
    if mode in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
        if max(box) > 1.01 or min(box) < -0.01:
            raise Fault(Kind.FORMAT, f"{text}; expected parts of the image, 0 to 1")
        box = [part * side for part, side in zip(box, (width, height) * 2, strict=True)]
        mode = BoxMode.XYXY_ABS if mode is BoxMode.XYXY_REL else BoxMode.XYWH_ABS
    return box, mode


def _box_problems(annotation: Annotation, height: int, width: int) -> list[Problem]:
    left, top, right, bottom = annotation["bbox"]
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        right, bottom = left + right, top + bottom
    if left == right or top == bottom:
        return [(Kind.EMPTY_BOX, f"bbox is {annotation['bbox']}")]
    return place_problems("bbox", (left, top, right, bottom), width, height)


def _mask(given: Any, height: int, width: int) -> tuple[Any, list[Problem]]:
    """Polygons or a compressed RLE, None if there is no mask; and the polygons' problems."""
    if given is None:
        return None, []
    if isinstance(given, Mapping):
        return (_rle(dict(given), height, width), []) if given else (None, [])
    if hasattr(given, "__array__") and not isinstance(given, list | tuple):
        array = np.asarray(given)
        if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
            array = array[0] if array.shape[0] == 1 else array[:, :, 0]
        if array.ndim == 2 and _is_bit_mask(array, height, width):
            return _encoded(array, height, width), []
        given = array.tolist()
    if not isinstance(given, list | tuple):
        raise Fault(Kind.FORMAT, f"segmentation is {short(given)}; expected {_SUPPORTED}")
    return _polygons(given, height, width) if len(given) else (None, [])


def _is_bit_mask(array: npt.NDArray[Any], height: int, width: int) -> bool:
    """Whether the array is a mask of pixels, not a list of outlines."""
    if array.dtype == bool or array.shape == (height, width):
        return True
    return array.shape[1] != 2 and bool(np.isin(array, (0, 1, 255)).all())


def _encoded(array: npt.NDArray[Any], height: int, width: int) -> dict[str, Any]:
    if array.shape != (height, width):
        turned = "; is it transposed?" if array.shape == (width, height) else ""
        raise Fault(
            Kind.RLE,
            f"the mask is an array of {array.shape}, its image of {(height, width)} (height, "
            f"width){turned}",
        )
    if array.dtype.kind not in "bui" and not np.isin(array, (0, 1)).all():
        raise Fault(Kind.FORMAT, f"the mask is an array of {array.dtype}; expected bool or uint8")
    return encode(array != 0)


def _rle(mask: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    counts, size = mask.get("counts"), mask.get("size")
    text = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    if not isinstance(text, str) and isinstance(text, list | tuple | np.ndarray):
        text = [whole(count) for count in text]
    sides = [whole(side) for side in size] if isinstance(size, list | tuple | np.ndarray) else size
    try:
        runs = check_rle({"size": sides, "counts": text}, height, width)
    except ValueError as error:
        raise Fault(Kind.RLE, str(error)) from None
    if isinstance(text, str):
        return {"size": sides, "counts": counts}
    return to_rle({"size": sides, "counts": runs}, height, width)


def _polygons(given: Any, height: int, width: int) -> tuple[Any, list[Problem]]:
    parts = [_plain(part) for part in given]
    polygons = flat_polygons(parts) or parts
    if not all(isinstance(part, list) and _are_numbers(part) for part in polygons):
        raise Fault(Kind.FORMAT, f"segmentation is {short(given)}; expected {_SUPPORTED}")
    polygons = [list(map(float, part)) for part in polygons]
    problems = polygon_problems(polygons, width, height)
    for kind, text in problems:
        if kind in (Kind.FEW_POINTS, Kind.NOT_FINITE):
            raise Fault(Kind.FORMAT, text)
    return usable_polygons(polygons), problems


def _plain(part: Any) -> Any:
    """Turn tuples and arrays into lists, and NumPy's numbers into Python's."""
    if hasattr(part, "tolist"):
        part = part.tolist()
    if not isinstance(part, list | tuple):
        return part
    return list(part) if _NUMBERS.issuperset(map(type, part)) else [_plain(v) for v in part]


def _are_numbers(values: Any) -> bool:
    if _NUMBERS.issuperset(map(type, values)):  # the common case, and fast
        return True
    return all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values)
