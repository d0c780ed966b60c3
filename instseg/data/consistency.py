"""Compare the fields of each instance, and name mistakes that most instances of a data set share.

A box that does not fit its mask gives a note about one instance.  If most boxes of a set do not
fit, one warning about the set names the likely cause: a program that wrote another convention.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from detectron2.structures import BoxMode

from instseg.data.findings import Finding, Kind, Level, Report
from instseg.data.readers.coco_check import usable_polygons
from instseg.data.readers.coco_forms import box_of
from instseg.masks import rle_area, rle_box, to_rle

_NOT_COMPARED = frozenset(
    {Kind.UNKNOWN_IMAGE, Kind.RLE, Kind.INVERTED_BOX, Kind.NOT_FINITE, Kind.FEW_POINTS}
)
Corners = tuple[float, float, float, float]

_HUGE = 2**31
"""Above any coordinate or area of an image."""
_SAMPLE = 500
"""Number of instances that show what holds for most of a set."""
_BOX_TOLERANCE = 0.05, 1.5
"""Allowed error of an edge: this fraction of the longer side, or this many pixels."""
_AREA_TOLERANCE = 0.1
"""Allowed relative error of an area."""
_FAR = 0.5
"""IoU with its mask's box below which a box counts as far from the mask."""


class Instance(NamedTuple):
    """The fields of an annotation in COCO's format.

    Attributes:
        id: of the annotation.
        text: its name in messages.
        box: x, y, width, height; finite.
        mask: polygons or a checked RLE, if there is one.
        area: pixels, if given.
        crowd: whether it stands for several instances.
        height, width: of the image.
    """

    id: Any
    text: str
    box: list[float]
    mask: Any
    area: Any
    crowd: bool
    height: int
    width: int


def check_consistency(instances: Iterable[Instance]) -> Iterator[Finding]:
    """Find fields that contradict each other, and mistakes that most instances share."""
    counts = _Counts()
    for instance in instances:
        if all(abs(value) < _HUGE for value in instance.box):
            counts.add(instance)
    yield from counts.findings()


def coco_instances(content: dict[str, Any], report: Report, step: int = 1) -> Iterator[Instance]:
    """Every ``step``-th annotation in COCO's format, except those that cannot be compared.

    Args:
        content: of the file.
        report: from :func:`~instseg.data.readers.coco_check.check_coco`, without errors of the
            format.
        step: 1 for all annotations.
    """
    images = {image["id"]: image for image in content["images"]}
    unusable = {key for kind in _NOT_COMPARED for key in report.ids.get(kind, ())}
    for entry in content.get("annotations", [])[::step]:
        image = images.get(entry["image_id"]) if entry["id"] not in unusable else None
        if image is not None:
            yield Instance(
                entry["id"],
                f"annotation {entry['id']} of image {image['id']} ({image['file_name']})",
                entry["bbox"],
                entry.get("segmentation"),
                entry.get("area"),
                bool(entry.get("iscrowd", 0)),
                image["height"],
                image["width"],
            )


def record_instances(records: list[dict[str, Any]], step: int = 1) -> Iterator[Instance]:
    """Every ``step``-th annotation of checked records."""
    entries = (
        (f"{index}:{number}", f"annotation {number} of record {index}", record, entry)
        for index, record in enumerate(records)
        for number, entry in enumerate(record.get("annotations", ()))
    )
    for key, text, record, entry in islice(entries, 0, None, step):
        x, y, *size = entry["bbox"]
        if entry["bbox_mode"] == BoxMode.XYXY_ABS:
            size = [size[0] - x, size[1] - y]
        yield Instance(
            entry.get("id", key),
            f"{text} ({record['file_name']})",
            [x, y, *size],
            entry.get("segmentation"),
            None,
            bool(entry.get("iscrowd", 0)),
            record["height"],
            record["width"],
        )


def sample_step(total: int) -> int:
    """The step that selects a few hundred of ``total`` instances."""
    return total // _SAMPLE + 1


def likely_mistakes(instances: Iterable[Instance]) -> Iterator[str]:
    """Messages of the warnings that :func:`check_consistency` gives about a set."""
    for finding in check_consistency(instances):
        if finding.kind.level is Level.WARNING:
            yield finding.message


_CONVENTIONS: dict[str, Callable[[float, float, float, float], Corners]] = {
    "corners [x1, y1, x2, y2]": lambda a, b, c, d: (a, b, c, d),
    "[centre x, centre y, width, height]": lambda a, b, c, d: (
        a - c / 2,
        b - d / 2,
        a + c / 2,
        b + d / 2,
    ),
    "[y, x, height, width]": lambda a, b, c, d: (b, a, b + d, a + c),
    "corners [y1, x1, y2, x2]": lambda a, b, c, d: (b, a, d, c),
    "[x, y, width, height] counted from 1": lambda a, b, c, d: (a - 1, b - 1, a + c - 1, b + d - 1),
}


@dataclass
class _Counts:
    total: int = 0
    crowds: int = 0
    boxes: Counter[tuple[float, ...]] = field(default_factory=Counter)
    with_mask: int = 0
    with_area: int = 0
    relative_boxes: int = 0
    """Boxes with all coordinates in 0 to 1."""
    relative_masks: int = 0
    possible_corners: int = 0
    """Boxes that could be corners."""
    certain_corners: int = 0
    """Boxes that leave the image as they are, but not if read as corners."""
    far: int = 0
    shifted: int = 0
    """Boxes that are their mask's box, moved by one pixel in x and y."""
    conventions: Counter[str] = field(default_factory=Counter)
    area_mistakes: Counter[str] = field(default_factory=Counter)
    box_notes: list[Finding] = field(default_factory=list)
    area_notes: list[Finding] = field(default_factory=list)

    def add(self, instance: Instance) -> None:
        box = instance.box
        self.total += 1
        self.crowds += instance.crowd
        self.boxes[tuple(box)] += 1
        x, y, across, down = box
        # One pixel in the image's corner also lies in 0 to 1, but most instances do not.
        self.relative_boxes += _in_unit(x, y, x + across, y + down) and across > 0
        if across > x and down > y and across <= instance.width + 1 and down <= instance.height + 1:
            self.possible_corners += 1
            self.certain_corners += (
                x + across > instance.width + 1 or y + down > instance.height + 1
            )
        tight = _tight_box(instance)
        if tight is None:
            return
        self.with_mask += 1
        self.relative_masks += _in_unit(*tight)
        self._compare_boxes(instance, tight)
        self._compare_areas(instance, tight)

    def _compare_boxes(self, instance: Instance, tight: Corners) -> None:
        corners = _corners(instance.box)
        if all(abs(one - other - 1) < 0.01 for one, other in zip(corners, tight, strict=True)):
            self.shifted += 1
        if _near(corners, tight, instance):
            return
        self.far += _iou(corners, tight) < _FAR
        for name, convention in _CONVENTIONS.items():
            if _near(convention(*instance.box), tight, instance):
                self.conventions[name] += 1
                break
        text = f"{instance.text}: its box is {_show(corners)}, that of its mask {_show(tight)}"
        self.box_notes.append(Finding(Kind.BOX_MISMATCH, instance.id, f"{text} (corners)"))

    def _compare_areas(self, instance: Instance, tight: Corners) -> None:
        given_area = instance.area
        # Evaluation ignores the areas of crowds, and COCO's own crowds have wrong ones.
        if instance.crowd or type(given_area) not in (int, float) or not abs(given_area) < _HUGE:
            return
        self.with_area += 1
        tolerance = tight[2] - tight[0] + tight[3] - tight[1] + 1
        area = _area(
            instance,
            tight,
            lambda value: abs(given_area - value) <= _AREA_TOLERANCE * value + tolerance,
        )
        if abs(given_area - area) <= _AREA_TOLERANCE * area + (tolerance if given_area else 0):
            return
        box_area = instance.box[2] * instance.box[3]
        if given_area == 0:
            self.area_mistakes["is 0"] += 1
        elif abs(given_area - box_area) <= 0.02 * box_area + 1:
            self.area_mistakes["is that of the box"] += 1
        text = f"{instance.text}: area is {given_area:g}, that of its mask {area:g}"
        self.area_notes.append(Finding(Kind.AREA_MISMATCH, instance.id, text))

    def findings(self) -> Iterator[Finding]:
        if self.total < 2 * self.crowds and self.crowds < self.total:
            text = (
                f"{self.crowds} of {self.total} instances are crowds (iscrowd 1): these are not "
                "trained on and count for nothing in evaluation; set iscrowd 0 for single ones"
            )
            yield Finding(Kind.MOST_CROWDS, None, text)
        cause = self._box_mistake()
        if cause is not None:
            yield cause
        else:
            yield from self.box_notes
        if _is_majority(self.relative_masks, self.with_mask):
            return  # areas in pixels cannot fit masks in 0 to 1
        if _is_majority(len(self.area_notes), self.with_area):
            mistakes = self.area_mistakes.most_common(1)
            likely = mistakes and _is_majority(mistakes[0][1], len(self.area_notes))
            what = mistakes[0][0] if likely else "is not that of the mask"
            text = (
                f"the area of {len(self.area_notes)} of {self.with_area} instances {what}; AP of "
                "small, medium and large instances counts by it"
            )
            yield Finding(Kind.AREAS, None, text)
        else:
            yield from self.area_notes

    def _box_mistake(self) -> Finding | None:
        """The mistake that most boxes share, if there is one."""
        wrong = len(self.box_notes)
        (box, count), *_ = self.boxes.most_common(1) or [((), 0)]
        if _is_majority(count, self.total) and (
            self.total > 2
            if not self.with_mask
            else _is_majority(wrong, self.with_mask) and count > 1
        ):
            text = f"{count} of {self.total} instances have the same box, {list(box)}"
            return Finding(Kind.SAME_BOX, None, text)
        if _is_majority(self.relative_boxes, self.total) or _is_majority(
            self.relative_masks, self.with_mask
        ):
            what = "boxes" if _is_majority(self.relative_boxes, self.total) else "masks"
            text = (
                f"the {what} of most of {self.total} instances lie within 0 to 1: parts of the "
                "image? expected pixels, so multiply x by its width and y by its height"
            )
            return Finding(Kind.RELATIVE, None, text)
        (name, count), *_ = self.conventions.most_common(1) or [("", 0)]
        if not self.with_mask and self.total > 2 and self.possible_corners == self.total:
            name, count = next(iter(_CONVENTIONS)), self.total if self.certain_corners else 0
        elif _is_majority(self.shifted, self.with_mask) and self.with_mask > 2:
            name, count = "[x, y, width, height] counted from 1", self.shifted
        if _is_majority(count, self.with_mask or self.total):
            total = self.with_mask or self.total
            text = (
                f"the boxes of {count} of {total} instances look like {name}; expected [x, y, "
                "width, height] in pixels from 0"
            )
            return Finding(Kind.BOXES, None, text)
        if _is_majority(self.far, self.with_mask):
            text = (
                f"the boxes of {self.far} of {self.with_mask} instances are elsewhere than their "
                f"masks; first {self.box_notes[0].message}"
            )
            return Finding(Kind.BOXES, None, text)
        return None


def _is_majority(count: int, total: int) -> bool:
    return 2 * count > total


def _in_unit(left: float, top: float, right: float, bottom: float) -> bool:
    return min(left, top) >= 0 and max(right, bottom) <= 1.001


def _corners(box: list[float]) -> Corners:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _tight_box(instance: Instance) -> Corners | None:
    mask = instance.mask
    if isinstance(mask, dict):
        around = rle_box(to_rle(mask, instance.height, instance.width))
        return _corners(around) if around[2] and around[3] else None
    box = box_of(mask, instance.height, instance.width) if mask else None
    return None if box is None else _corners(box)


def _area(instance: Instance, tight: Corners, fits: Callable[[float], bool]) -> float:
    """Pixels of a mask.  Polygons are computed from their corners, or drawn if that fails ``fits``.

    Polygons far outside the image are never drawn.
    """
    height, width = instance.height, instance.width
    if isinstance(instance.mask, dict):
        return float(rle_area(to_rle(instance.mask, height, width)))
    polygons = usable_polygons(instance.mask)
    area = sum(_polygon_area(polygon) for polygon in polygons)
    inside = min(tight) > -max(height, width) and max(tight) < 2 * max(height, width)
    if fits(area) or not inside:
        return area
    return float(rle_area(to_rle(polygons, height, width)))


def _polygon_area(polygon: list[float]) -> float:
    xs, ys = polygon[0::2], polygon[1::2]
    pairs = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in pairs)) / 2


def _near(one: Corners, other: Corners, instance: Instance) -> bool:
    """Whether boxes agree, at least inside the image."""
    limits = (instance.width, instance.height) * 2
    fraction, pixels = _BOX_TOLERANCE
    tolerance = max(pixels, fraction * max(other[2] - other[0], other[3] - other[1]))
    return all(
        abs(a - b) <= tolerance or abs(min(max(a, 0), limit) - min(max(b, 0), limit)) <= tolerance
        for a, b, limit in zip(one, other, limits, strict=True)
    )


def _iou(one: Corners, other: Corners) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(across, 0) * max(down, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / max(sum(areas) - shared, 1e-9)


def _show(corners: Corners) -> str:
    return "[" + ", ".join(f"{value:g}" for value in corners) + "]"
