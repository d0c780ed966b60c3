"""Bring the ways in which programs write COCO's format to the one that everything reads."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from instseg.data.findings import Finding, Kind
from instseg.data.readers.json_files import crowd_flag, size_in_pixels, slashes, whole
from instseg.errors import short
from instseg.masks import check_rle, rle_box, to_rle

Change = tuple[Kind, str]
_NUMBERS = (int, float)
_FAR = 2**31
"""Above any coordinate; NaN does not compare as below it."""


def to_standard(content: Any, image_root: str) -> list[Finding]:
    """Rewrite ``content`` in place; return a note for each kind of change of an entry.

    Numbers such as 96.0 and "96" become whole, ``iscrowd`` becomes 0 or 1, outlines become lists of
    [x, y, x, y, ...], and a missing ``bbox`` becomes that of the mask.  Values without a clear
    meaning stay; :func:`~instseg.data.readers.coco_check.check_coco` refuses them.

    Args:
        content: of a JSON file.
        image_root: folder in which backslashes of a ``file_name`` may stand for slashes.
    """
    lists = content if isinstance(content, dict) else {}
    notes: list[Finding] = []
    sizes: dict[Any, tuple[Any, Any]] = {}
    for image in _entries(lists, "images"):
        notes += _findings("image", image, _image_changes(image, image_root))
        key = image.get("id")
        if type(key) in (int, str):
            sizes[key] = image.get("height"), image.get("width")
    for category in _entries(lists, "categories"):
        notes += _findings("category", category, _number_changes(category, ("id",)))
    for annotation in _entries(lists, "annotations"):
        notes += _findings("annotation", annotation, _annotation_changes(annotation, sizes))
    return notes


def flat_polygons(mask: list[Any]) -> list[Any] | None:
    """Turn one list [x, y, x, y, ...], or points [x, y], into a list of such lists.

    Args:
        mask: outlines of an instance, made of lists and numbers only.
    Returns:
        None if nothing has to be changed.
    """
    if all(type(part) is list and len(part) > 2 and type(part[0]) is not list for part in mask):
        return None
    if all(type(value) in _NUMBERS for value in mask):
        return [mask]
    if len(mask) > 2 and _are_points(mask):
        return [list(chain.from_iterable(mask))]
    if not any(part and _are_points(part) for part in mask):
        return None
    return [list(chain.from_iterable(part)) if _are_points(part) else part for part in mask]


def box_of(mask: Any, height: Any, width: Any) -> list[float] | None:
    """[x, y, width, height] around a mask in COCO's format; None if the mask cannot be used."""
    if isinstance(mask, dict):
        try:
            counts = check_rle(mask, height, width)
        except ValueError:
            return None
        return rle_box(to_rle({**mask, "counts": counts}, height, width))
    if not isinstance(mask, list) or not mask or not all(type(part) is list for part in mask):
        return None
    numbers = [[part[0::2], part[1::2]] for part in mask if len(part) >= 6 and not len(part) % 2]
    xs = list(chain.from_iterable(part[0] for part in numbers))
    ys = list(chain.from_iterable(part[1] for part in numbers))
    if not xs or not all(type(v) in _NUMBERS and -_FAR < v < _FAR for v in chain(xs, ys)):
        return None
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _are_points(part: Any) -> bool:
    return isinstance(part, list) and all(
        type(point) is list and len(point) == 2 and all(type(v) in _NUMBERS for v in point)
        for point in part
    )


def _entries(lists: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    entries = lists.get(field)
    yield from (e for e in (entries if isinstance(entries, list) else ()) if isinstance(e, dict))


def _findings(what: str, entry: dict[str, Any], changes: Iterator[Change]) -> Iterator[Finding]:
    """One finding for each kind of change."""
    texts: dict[Kind, list[str]] = {}
    for kind, text in changes:
        texts.setdefault(kind, []).append(text)
    for kind, parts in texts.items():
        key = entry.get("id")
        known = type(key) in (int, str)
        name = f" {key}" if known else ""
        yield Finding(kind, key if known else None, f"{what}{name}: {', '.join(parts)}")


def _image_changes(image: dict[str, Any], image_root: str) -> Iterator[Change]:
    yield from _number_changes(image, ("id",))
    for key in ("width", "height"):
        value = image.get(key)
        if type(value) is not int and (pixels := size_in_pixels(value)) is not value:
            image[key] = pixels
            yield Kind.NUMBER, f"{key} is {value!r}, taken as {pixels}"
    file = image.get("file_name")
    if isinstance(file, str) and (turned := slashes(file, image_root)) is not file:
        image["file_name"] = turned
        yield Kind.BACKSLASH, f"file_name is {file}, taken as {turned}"


def _annotation_changes(
    annotation: dict[str, Any], sizes: dict[Any, tuple[Any, Any]]
) -> Iterator[Change]:
    yield from _number_changes(annotation, ("id", "image_id", "category_id"))
    crowd = annotation.get("iscrowd", 0)
    if type(crowd) is not int and (flag := crowd_flag(crowd)) is not crowd:
        annotation["iscrowd"] = flag
        yield Kind.NUMBER, f"iscrowd is {crowd!r}, taken as {flag}"
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        yield from _rle_changes(mask)
    elif isinstance(mask, list) and mask and (parts := flat_polygons(mask)) is not None:
        annotation["segmentation"] = mask = parts
        yield Kind.POINTS, "segmentation is taken as [[x, y, x, y, ...], ...]"
    if annotation.get("bbox") in (None, []):
        key = annotation.get("image_id")
        height, width = sizes.get(key, (0, 0)) if type(key) in (int, str) else (0, 0)
        box = box_of(mask, height, width)
        if box is not None:
            annotation["bbox"] = box
            yield Kind.NO_BOX, f"bbox is missing; that of the mask is {short(box)}"


def _rle_changes(mask: dict[str, Any]) -> Iterator[Change]:
    for key in ("size", "counts"):
        values = mask.get(key)
        if isinstance(values, list) and any(type(value) is float for value in values):
            numbers = [whole(value) for value in values]
            if all(type(number) is int for number in numbers):
                mask[key] = numbers
                yield Kind.NUMBER, f"{key} of its RLE are taken as whole numbers"


def _number_changes(entry: dict[str, Any], keys: tuple[str, ...]) -> Iterator[Change]:
    for key in keys:
        value = entry.get(key)
        if type(value) is float and (number := whole(value)) is not value:
            entry[key] = number
            yield Kind.NUMBER, f"{key} is {value}, taken as {number}"
