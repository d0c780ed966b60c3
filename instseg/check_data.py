"""Check data sets completely: annotations, images, and images that two sets share."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

from instseg.config.nodes import get_cfg
from instseg.data.build import (
    check_masks,
    class_difference,
    nothing_to_train_on,
    register_datasets,
)
from instseg.data.consistency import check_consistency, coco_instances, record_instances
from instseg.data.dataset import Content, Source, check_name, load, reading
from instseg.data.findings import Finding, Kind, Level, Report, first_ids
from instseg.data.image_headers import MAX_PIXELS
from instseg.data.images import describe_image
from instseg.data.intensity import other_channels, too_deep
from instseg.data.readers.coco_check import check_coco
from instseg.data.readers.coco_forms import to_standard
from instseg.data.readers.json_files import file_of, read_json
from instseg.data.records import CheckedRecords
from instseg.data.synthetic.files import is_elsewhere
from instseg.errors import DatasetError, ImageError


class _Image(NamedTuple):
    id: Any
    file: str
    width: Any
    height: Any


@dataclass
class CheckedSet:
    """A data set and its findings.

    Attributes:
        name: of the data set.
        report: the findings.
        images: those with a file name.
        classes: names in the order of their ids; empty if unknown.
        annotations: number of annotations.
        counts: id of an image → number of instances in it, without crowds.
    """

    name: str
    report: Report = field(default_factory=lambda: Report([]))
    images: list[_Image] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    annotations: int = 0
    counts: Counter[Any] = field(default_factory=Counter)

    def table(self) -> str:
        """A table with one line for each kind of finding, and the first message of each kind."""
        title = (
            f"{self.name}: images {len(self.images)}, annotations {self.annotations}, classes "
            f"{len(self.classes)}"
        )
        ids = self.report.ids
        kinds = [kind for kind in Kind if kind in ids]
        if not kinds:
            return f"{title}\nnothing found"
        rows = [(k.level.value, k.text, len(ids[k]), _listing(ids[k])) for k in kinds]
        table = tabulate(rows, ("level", "finding", "count", "first ids"), disable_numparse=True)
        examples = (f"{kind.text}: {self.report.examples[kind]}" for kind in kinds)
        return "\n".join((title, table, "the first of each:", *examples))


def check_data(names: Sequence[str]) -> Iterator[CheckedSet]:
    """Check data sets one after the other, each also against those before it.

    Args:
        names: as in ``DATASETS.TRAIN``.
    Raises:
        DatasetError: a name is unknown.
    """
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = tuple(names)
    register_datasets(cfg)
    for name in names:
        check_name(name)
    first: CheckedSet | None = None
    contents = _Contents()
    for name in names:
        checked = CheckedSet(name)
        try:
            _read(checked)
        except DatasetError as error:
            checked.report.add([Finding(Kind.FORMAT, None, str(error))])
        checked.report.add(_check_counts(checked, cfg.TEST.DETECTIONS_PER_IMAGE))
        for image in tqdm(checked.images, unit="image", disable=None):
            checked.report.add(_check_image(image))
            checked.report.add(contents.findings(image))
        contents.add(checked)
        if checked.classes and first is not None:
            difference = class_difference(first, checked)
            if difference is not None:
                checked.report.add([Finding(Kind.CLASSES, None, difference)])
        first = first or (checked if checked.classes else None)
        yield checked


def _read(checked: CheckedSet) -> None:
    function = DatasetCatalog[checked.name]
    if isinstance(function, CheckedRecords):
        _read_registered(checked, function)
        return
    if isinstance(function, Source) and function.examine is not None:
        _read_examined(checked, *function.examine())
        return
    metadata = MetadataCatalog.get(checked.name)
    json_file, root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") == "coco" and json_file and root:
        _read_coco(checked, read_json(json_file, file_of(checked.name, json_file)), root)
    else:
        _read_records(checked)


def _read_coco(checked: CheckedSet, content: Any, root: str) -> None:
    report = checked.report
    report.add(to_standard(content, root))
    report.add(check_coco(content))
    for image in _entries(content, "images"):
        file, width, height = (image.get(key) for key in ("file_name", "width", "height"))
        if isinstance(file, str) and file:
            # A size that check_coco refuses is not compared with the image.
            known = type(width) is type(height) is int and 0 < width * height <= MAX_PIXELS
            size = (width, height) if known else (None, None)
            checked.images.append(_Image(image.get("id"), os.path.join(root, file), *size))
    annotations = _entries(content, "annotations")
    checked.annotations = len(annotations)
    if Kind.FORMAT in report.ids:
        return
    categories = sorted(_entries(content, "categories"), key=lambda entry: entry["id"])
    checked.classes = [entry["name"] for entry in categories]
    if report.has(Level.ERROR):
        return
    report.add(check_consistency(coco_instances(content, report)))
    left_out = report.left_out()
    used_annotations = [entry for entry in annotations if entry["id"] not in left_out]
    for entry in used_annotations:
        checked.counts[entry["image_id"]] += not entry.get("iscrowd", 0)
    if all(entry.get("iscrowd", 0) for entry in used_annotations):
        annotated = len({entry["image_id"] for entry in used_annotations})
        message = nothing_to_train_on(annotated, len(checked.images))
        report.add([Finding(Kind.NO_INSTANCE, None, message)])


def _read_registered(checked: CheckedSet, function: CheckedRecords) -> None:
    with reading(checked.name):
        records, report = function.examine()
    checked.report = report
    report.add(check_consistency(record_instances(records)))
    _add_records(checked, records)
    annotated = sum(bool(record.get("annotations")) for record in records)
    crowds = all(entry["iscrowd"] for record in records for entry in record.get("annotations", ()))
    if crowds and not report.has(Level.ERROR):
        message = nothing_to_train_on(annotated, len(records))
        checked.report.add([Finding(Kind.NO_INSTANCE, None, message)])


def _read_examined(checked: CheckedSet, content: Content, report: Report) -> None:
    """Take over what a reader of ours found."""
    checked.report = report
    _add_records(checked, content.records)
    checked.classes = list((content.classes or {}).values())
    if not checked.annotations and not checked.report.has(Level.ERROR):
        message = nothing_to_train_on(0, len(content.records))
        checked.report.add([Finding(Kind.NO_INSTANCE, None, message)])


def _read_records(checked: CheckedSet) -> None:
    """Read a set in another format; its own reader checks it."""
    _add_records(checked, load(checked.name).records)


def _add_records(checked: CheckedSet, records: Sequence[dict[str, Any]]) -> None:
    checked.classes = list(MetadataCatalog.get(checked.name).get("thing_classes", []))
    for record in records:
        size = record.get("width"), record.get("height")
        checked.images.append(_Image(record.get("image_id"), record["file_name"], *size))
        annotations = record.get("annotations", ())
        checked.annotations += len(annotations)
        single = sum(not entry.get("iscrowd", 0) for entry in annotations)
        checked.counts[record.get("image_id")] = single
    check_masks(checked.name, records)


def _check_counts(checked: CheckedSet, limit: int) -> Iterator[Finding]:
    """Images with more instances than a model gives by default."""
    for key, count in checked.counts.items():
        if count > limit:
            message = (
                f"image {key} has {count} instances, and TEST.DETECTIONS_PER_IMAGE is {limit} "
                f"unless it is set: those beyond count as missed; set TEST.DETECTIONS_PER_IMAGE "
                f"{max(checked.counts.values())}"
            )
            yield Finding(Kind.MANY_INSTANCES, key, message)


def _entries(content: Any, key: str) -> list[dict[str, Any]]:
    entries = content.get(key) if isinstance(content, dict) else None
    return [entry for entry in entries or () if isinstance(entry, dict)]


def _check_image(image: _Image) -> Iterator[Finding]:
    key, file, *expected = image
    if is_elsewhere(file):
        return
    if not os.path.isfile(file):
        yield Finding(Kind.MISSING_IMAGE, key, f"image {key}: there is no file {file}")
        return
    try:
        facts = describe_image(file)
    except ImageError as error:
        yield Finding(Kind.UNREADABLE_IMAGE, key, f"image {key}: {error}")
        return
    if expected != [None, None] and expected != [facts.width, facts.height]:
        size = f"{facts.width} x {facts.height} pixels"
        message = f"image {key} ({file}) is {size}, the data set says {expected[0]} x {expected[1]}"
        yield Finding(Kind.IMAGE_SIZE, key, message)
    channels = f"{facts.channels} channel{'s' * (facts.channels > 1)} of {facts.depth}"
    if facts.limits is not None:
        depth = f"{channels} with values of {facts.limits[0]:g} to {facts.limits[1]:g}"
        yield Finding(Kind.DEPTH, key, f"image {key}: {too_deep(file, depth)}")
    if facts.channels not in (1, 3):
        yield Finding(Kind.CHANNELS, key, f"image {key}: {other_channels(file, channels)}")


class _Contents:
    """Finds files of equal content in several data sets; reads only files of equal size."""

    def __init__(self) -> None:
        self._files: dict[int, list[tuple[str, str]]] = defaultdict(list)
        self._hashes: dict[str, bytes] = {}

    def add(self, checked: CheckedSet) -> None:
        """Add the images of a set."""
        for image in checked.images:
            if os.path.isfile(image.file):
                size = os.path.getsize(image.file)
                self._files[size].append((checked.name, image.file))

    def findings(self, image: _Image) -> Iterator[Finding]:
        """A finding if an earlier set has this image."""
        if not os.path.isfile(image.file):
            return
        for name, file in self._files.get(os.path.getsize(image.file), ()):
            if self._hash(file) == self._hash(image.file):
                message = f"image {image.id} ({image.file}) is {file} of {name}"
                yield Finding(Kind.LEAKAGE, image.id, message)
                return

    def _hash(self, file: str) -> bytes:
        if file not in self._hashes:
            self._hashes[file] = hashlib.sha256(Path(file).read_bytes()).digest()
        return self._hashes[file]


def _listing(ids: list[Any]) -> str:
    return first_ids([key for key in ids if key is not None])
