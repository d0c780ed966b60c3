"""Check the annotations of a data set in COCO's format before anything relies on them.

:mod:`instseg.data.readers.coco_forms` first brings other ways of writing the format to one.
``instseg check-data`` shows all findings.  Reading a set for training or evaluation refuses errors
and leaves out instances that no model can learn from.  No image is opened here.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from instseg.data.findings import Finding, Kind, first_ids
from instseg.data.image_headers import MAX_PIXELS
from instseg.masks import check_rle

Problem = tuple[Kind, str]
_NUMBERS = (int, float)


@dataclass
class _Known:
    """Images or categories that annotations may refer to.

    Attributes:
        entries: the usable ones, by id.
        refused: ids of the others; an annotation that refers to them is not at fault.
        complete: whether every entry has an id, so that an unknown id belongs to no entry.
    """

    entries: dict[Any, dict[str, Any]] = field(default_factory=dict)
    refused: set[Any] = field(default_factory=set)
    complete: bool = True

    def misses(self, key: Any) -> bool:
        """Whether certainly no entry has this id, so that the reference is at fault."""
        return self.complete and not (_is_id(key) and (key in self.entries or key in self.refused))


def check_coco(content: Any, *, masks: bool = True) -> Iterator[Finding]:
    """Findings about ``content``, in the order of the file.

    Args:
        content: of a JSON file.
        masks: also report instances without a mask, which training without masks can use.
    """
    keys = content if isinstance(content, dict) else {}
    lists = [keys.get("images"), keys.get("categories"), keys.get("annotations", [])]
    for name, entries in zip(("images", "categories", "annotations"), lists, strict=True):
        if not isinstance(entries, list) or not (entries or name == "annotations"):
            message = f"there are no {name}; expected the COCO instance format"
            yield Finding(Kind.FORMAT, None, message)
            return
    images = yield from _check_images(lists[0])
    categories = yield from _check_categories(lists[1])
    annotation_ids: set[Any] = set()
    for entry in lists[2]:
        key = entry.get("id") if isinstance(entry, dict) else None
        if not _is_id(key):
            message = f"an annotation is {_short(entry)}; expected an object with an id"
            yield Finding(Kind.FORMAT, None, message)
            continue
        if key in annotation_ids:
            message = f"two annotations have the id {key!r}; expected one id for each"
            yield Finding(Kind.ANNOTATION_ID, key, message)
        annotation_ids.add(key)
        image_id = entry.get("image_id")
        image = images.entries.get(image_id) if _is_id(image_id) else None
        if image is None:
            if images.misses(image_id):
                message = f"annotation {key} belongs to the image {image_id!r}, which is not there"
                yield Finding(Kind.UNKNOWN_IMAGE, key, message)
            continue
        problems = _category_problems(entry, categories)
        problems += _instance_problems(entry, image["width"], image["height"], masks)
        for kind, text in problems:
            message = f"annotation {key} of image {image_id} ({image['file_name']}): {text}"
            yield Finding(kind, key, message)


def _check_images(entries: list[Any]) -> Generator[Finding, None, _Known]:
    images = _Known()
    files: set[Any] = set()
    for entry in entries:
        key = entry.get("id") if isinstance(entry, dict) else None
        file = entry.get("file_name") if isinstance(entry, dict) else None
        text = _image_problem(entry, key, file)
        if text is not None:
            images.complete &= _is_id(key)
            images.refused |= {key} if _is_id(key) else set()
            named = _is_id(key) and isinstance(file, str) and file
            yield Finding(Kind.FORMAT, key if named else None, text)
            continue
        if key in images.entries:
            first = images.entries[key]["file_name"]
            message = f"two images have the id {key!r}: {first} and {file}"
            yield Finding(Kind.IMAGE_ID, key, message)
        if file in files:
            message = f"image {key} is {file}, as another image is"
            yield Finding(Kind.REPEATED_FILE, key, message)
        files.add(file)
        images.entries[key] = entry
    if len({type(key) is str for key in images.entries}) > 1:
        images.complete = False
        message = "some ids of images are numbers and others text; expected one of the two"
        yield Finding(Kind.FORMAT, None, message)
    return images


def _image_problem(entry: Any, key: Any, file: Any) -> str | None:
    """The problem of a single image entry, if it has one."""
    if not _is_id(key) or not isinstance(file, str) or not file:
        return f"an image is {_short(entry)}; expected an object with id and file_name"
    width, height = entry.get("width"), entry.get("height")
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        return (
            f"image {key} ({file}) has width {width!r} and height {height!r}; expected its size in "
            "pixels"
        )
    if width * height > MAX_PIXELS:
        return (
            f"image {key} ({file}) is said to be {width} x {height} pixels; expected at most "
            f"{MAX_PIXELS} pixels in all"
        )
    return None


def _check_categories(entries: list[Any]) -> Generator[Finding, None, _Known]:
    categories = _Known()
    names: set[str] = set()
    for entry in entries:
        key = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if type(key) is not int or not isinstance(name, str):
            categories.complete &= type(key) is int
            categories.refused |= {key} if type(key) is int else set()
            message = f"a category is {_short(entry)}; expected an object with a whole number as id"
            yield Finding(Kind.FORMAT, None, f"{message} and a name")
            continue
        if key in categories.entries:
            first = categories.entries[key]["name"]
            message = f"two categories have the id {key}: {first} and {name}"
            yield Finding(Kind.CATEGORY_ID, key, message)
        if name in names:
            yield Finding(Kind.REPEATED_NAME, key, f"category {key} is {name}, as another one is")
        names.add(name)
        categories.entries[key] = entry
    return categories


def _category_problems(annotation: dict[str, Any], categories: _Known) -> list[Problem]:
    key = annotation.get("category_id")
    if not categories.misses(key):
        return []
    ids = first_ids(sorted(categories.entries), 10)
    text = f"category_id is {key!r} of type {type(key).__name__}; the categories have the ids {ids}"
    return [(Kind.UNKNOWN_CATEGORY, text)]


def _instance_problems(
    annotation: dict[str, Any], width: int, height: int, masks: bool
) -> list[Problem]:
    problems: list[Problem] = []
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        problems.append((Kind.FORMAT, f"iscrowd is {_short(crowd)}; expected 0 or 1"))
    if annotation.get("ignore", 0) != 0:
        text = "ignore is set, which COCO's format does not know; set iscrowd to 1 instead"
        problems.append((Kind.FORMAT, text))
    points = annotation.get("keypoints") or []
    if not isinstance(points, list) or not all(type(value) in _NUMBERS for value in points):
        text = f"keypoints are {_short(points)}; expected numbers, [x, y, visibility, ...]"
        problems.append((Kind.FORMAT, text))
    box, mask = annotation.get("bbox"), annotation.get("segmentation")
    if box not in (None, []) or not mask:  # a missing box beside a mask is the mask's fault
        problems += _box_problems(box, width, height)
    if isinstance(mask, list) and mask:
        problems += polygon_problems(mask, width, height)
    elif isinstance(mask, dict) and mask:
        problems += _rle_problems(mask, width, height)
    elif mask:
        text = f"segmentation is {_short(mask)}; expected a list of polygons or an RLE"
        problems.append((Kind.FORMAT, text))
    elif masks:
        text = "it has no segmentation; expected a list of polygons or an RLE"
        problems.append((Kind.NO_MASK, text))
    return problems


def _box_problems(box: Any, width: int, height: int) -> list[Problem]:
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in _NUMBERS for v in box):
        text = f"bbox is {_short(box)}; expected [x, y, width, height] in pixels"
        return [(Kind.FORMAT, text)]
    if not _is_finite(box):
        return [(Kind.NOT_FINITE, f"bbox is {_short(box)}")]
    x, y, across, down = box
    if across < 0 or down < 0:
        text = f"bbox is {box}, of negative size; expected [x, y, width, height] in pixels"
        return [(Kind.INVERTED_BOX, text)]
    if not across or not down:
        return [(Kind.EMPTY_BOX, f"bbox is {box}")]
    left, top = float(x), float(y)
    return place_problems("bbox", (left, top, left + across, top + down), width, height)


def place_problems(
    what: str, corners: tuple[float, float, float, float], width: int, height: int
) -> list[Problem]:
    """The problem of a box or outline that leaves the image, if it does."""
    left, top, right, bottom = corners
    if left >= -1 and top >= -1 and right <= width + 1 and bottom <= height + 1:
        return []
    text = (
        f"{what} reaches from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), the image is "
        f"{width} x {height}"
    )
    off = left >= width or top >= height or right <= 0 or bottom <= 0
    # Drawing an outline takes memory for its every pixel, even for millions far outside the image.
    far = left < -width or top < -height or right > 2 * width or bottom > 2 * height
    return [(Kind.OUTSIDE if off or far else Kind.PARTLY_OUTSIDE, text)]


def polygon_problems(polygons: list[Any], width: int, height: int) -> list[Problem]:
    """Problems of the polygons of one instance."""
    if not all(isinstance(polygon, list) for polygon in polygons):
        text = f"segmentation is {_short(polygons)}; expected polygons, [[x, y, x, y, ...], ...]"
        return [(Kind.FORMAT, text)]
    usable = usable_polygons(polygons)
    if not usable:
        lengths = ", ".join(str(len(polygon)) for polygon in polygons[:5])
        text = f"its polygons have {lengths} numbers; expected 6 or more, an even number"
        return [(Kind.FEW_POINTS, text)]
    problems: list[Problem] = []
    if len(usable) < len(polygons):
        text = f"{len(polygons) - len(usable)} of its {len(polygons)} polygons are left out"
        problems.append((Kind.POLYGON_PART, text))
    numbers = usable[0] if len(usable) == 1 else list(chain.from_iterable(usable))
    try:
        finite = _is_finite(numbers)
    except TypeError:
        text = f"segmentation is {_short(polygons)}; expected numbers, [[x, y, x, y, ...], ...]"
        return [(Kind.FORMAT, text)]
    if not finite:
        return [*problems, (Kind.NOT_FINITE, "its polygons have coordinates that are not finite")]
    x, y = numbers[::2], numbers[1::2]
    # As floats: the sum or difference of large integers may be too large for a float.
    corners = float(min(x)), float(min(y)), float(max(x)), float(max(y))
    if corners[2] - corners[0] < 1 or corners[3] - corners[1] < 1:
        text = f"its polygons span {corners[2] - corners[0]:g} x {corners[3] - corners[1]:g} pixels"
        problems.append((Kind.TINY_MASK, text))
    return problems + place_problems("its outline", corners, width, height)


def usable_polygons(polygons: list[list[float]]) -> list[list[float]]:
    """The polygons with 3 points or more, as Detectron2 selects them for training."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _rle_problems(mask: dict[str, Any], width: int, height: int) -> list[Problem]:
    try:
        counts = check_rle(mask, height, width)
    except ValueError as error:
        return [(Kind.RLE, str(error))]
    return [] if any(counts[1::2]) else [(Kind.TINY_MASK, "its RLE has no pixel")]


def _is_id(value: Any) -> bool:
    """Whether a value can be an id; pandas turns whole numbers into floats such as 7.0."""
    return type(value) in (int, str) or (type(value) is float and value.is_integer())


def _is_finite(numbers: list[Any]) -> bool:
    """Whether all are finite.

    Raises:
        TypeError: some are no numbers.
    """
    try:
        return all(map(math.isfinite, numbers))
    except OverflowError:  # an integer too large for a float
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
