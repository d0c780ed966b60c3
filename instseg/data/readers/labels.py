"""Data sets of label images: no JSON, no Python.

``labels:IMAGES:LABELS`` names two folders.  Each image has one label image, a TIFF or PNG of the
same stem (``a.tif`` and ``a.png``; ``a_labels.tif``, as ``instseg predict`` writes it, will do).
Its pixels are 0 for the background and one number per instance.  Labels need not be consecutive.
``labels:IMAGES:LABELS:CLASSES.csv`` adds classes; see :mod:`instseg.data.readers.label_classes`.
"""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from instseg.data.dataset import Content
from instseg.data.findings import Finding, Kind, Level, Report
from instseg.data.images import image_size, read_labels
from instseg.data.label_images import Labels, label_rles, labels_in_pieces
from instseg.data.readers.label_classes import ClassTable, read_classes
from instseg.data.suffixes import IMAGE_SUFFIXES
from instseg.errors import DatasetError, ImageError
from instseg.masks import annotation_of

logger = logging.getLogger(__name__)

PREFIX = "labels:"
_DRIVE = r"(?:[A-Za-z]:[\\/])?"
"""Beginning of a path under Windows, whose colon does not end the folder."""
_NAME = re.compile(
    rf"{PREFIX}(?P<images>{_DRIVE}[^:]+):(?P<labels>{_DRIVE}[^:]+)"
    rf"(?::(?P<classes>{_DRIVE}[^:]+\.csv))?",
    re.IGNORECASE | re.DOTALL,
)
_LABEL_SUFFIXES = frozenset((".png", ".tif", ".tiff"))
_PREDICTED = "_labels"
_ONE_CLASS = {1: "object"}


class LabelSet(NamedTuple):
    """The parts of a name.

    Attributes:
        images, labels: folders.
        classes: a CSV file, or None for a single class.
    """

    images: str
    labels: str
    classes: str | None

    def files(self) -> list[str]:
        """All files whose change changes the data set; none from a folder that is not there."""
        folders = ((self.images, IMAGE_SUFFIXES), (self.labels, _LABEL_SUFFIXES))
        files = [str(path) for folder, kinds in folders for path in _files(folder, kinds)]
        return files if self.classes is None else [*files, self.classes]


def parse_name(name: str) -> LabelSet:
    """``labels:IMAGES:LABELS[:CLASSES.csv]`` → its parts, with ``~`` replaced.

    Raises:
        DatasetError: the name does not have that form.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise DatasetError(
            f"cannot read the data set name {name!r}; expected labels:IMAGES:LABELS, two folders, "
            "or labels:IMAGES:LABELS:CLASSES.csv"
        )
    return LabelSet(*(part and os.path.expanduser(part) for part in parts.group(1, 2, 3)))


def load(name: str, parts: LabelSet) -> Content:
    """One record per image with labels, in the order of the stems, which are their ids.

    Annotations are in the order of the labels, which are their ids.

    Raises:
        DatasetError: there is nothing to read, or a finding of :func:`examine` is an error.
    """
    content, report = examine(name, parts, pieces=False)
    error = next(report.lines(Level.ERROR), None)
    if error is not None:
        raise DatasetError(f"data set {name}: {error}; `instseg check-data` shows all of it")
    for line in report.warnings():
        logger.warning("data set %s: %s", name, line)
    return content


def examine(name: str, parts: LabelSet, *, pieces: bool = True) -> tuple[Content, Report]:
    """The usable images of a set, and a report on everything that was found.

    Args:
        name: of the data set, for messages.
        parts: of the name.
        pieces: look for labels that consist of several pieces.
    Raises:
        DatasetError: a folder is missing or empty, or the list of classes cannot be read.
    """
    images = _by_stem(_filled(name, parts.images, "images", IMAGE_SUFFIXES))
    labels = _by_stem(_filled(name, parts.labels, "label images", _LABEL_SUFFIXES))
    for stem in [stem for stem in labels if stem not in images and stem.endswith(_PREDICTED)]:
        labels[stem.removesuffix(_PREDICTED)] += labels.pop(stem)
    table = None if parts.classes is None else read_classes(name, parts.classes)
    report = Report(_unpaired(images, labels))
    records = []
    pairs = [(stem, images[stem], labels[stem]) for stem in sorted(images) if stem in labels]
    for stem, (image, *_), (file, *_) in tqdm(pairs, unit="label image", disable=None):
        try:
            record, numbers = _record(stem, image, file)
        except _Unusable as error:
            report.add([Finding(error.kind, stem, str(error))])
            continue
        if table is not None:
            report.add(_take_classes(record, table, stem, file))
        report.add(_pieces(stem, file, numbers) if pieces else ())
        records.append(record)
    if not pairs:
        text = f"no image of {parts.images} has labels in {parts.labels}; expected equal stems, "
        text += f"found {next(iter(images))} and {next(iter(labels))}"
        report.add([Finding(Kind.FORMAT, None, text)])
    classes = _ONE_CLASS if table is None else table.classes
    return Content(records, classes, annotated=True), report


class _Unusable(Exception):
    """An image or label image that cannot be used."""

    def __init__(self, kind: Kind, text: object) -> None:
        super().__init__(str(text))
        self.kind = kind


def _files(folder: str, suffixes: frozenset[str]) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [Path(folder, name) for name in names if not name.startswith(".")]
    return [path for path in paths if path.suffix.lower() in suffixes and not os.path.isdir(path)]


def _filled(name: str, folder: str, what: str, suffixes: frozenset[str]) -> list[Path]:
    """The files of a folder.

    Raises:
        DatasetError: there are none.
    """
    if not os.path.isdir(folder):
        raise DatasetError(f"data set {name}: there is no folder {folder}; expected one of {what}")
    files = _files(folder, suffixes)
    if not files:
        kinds = "" if len(suffixes) > 3 else f" ({', '.join(sorted(suffixes))})"
        raise DatasetError(f"data set {name}: the folder {folder} holds no {what}{kinds}")
    return files


def _stem(path: Path) -> str:
    return path.stem.removesuffix(".ome")


def _by_stem(files: list[Path]) -> defaultdict[str, list[Path]]:
    stems: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        stems[_stem(path)].append(path)
    return stems


def _unpaired(images: dict[str, list[Path]], labels: dict[str, list[Path]]) -> Iterator[Finding]:
    for kind, files in (("images", images), ("label images", labels)):
        for stem, of_stem in files.items():
            if len(of_stem) > 1:
                text = f"two {kind} have the stem {stem}, {of_stem[0].name} and {of_stem[1].name}"
                yield Finding(Kind.SAME_STEM, stem, f"{text}; expected one: move the other away")
    for stem, (image, *_) in images.items():
        if stem not in labels:
            text = f"{image} has no labels and is left out; expected {stem}.tif or {stem}.png"
            yield Finding(Kind.NO_LABELS, stem, f"{text}, of zeros if it has no instances")
    for stem in sorted(set(labels) - set(images)):
        text = f"{labels[stem][0]} has no image and is left out; expected one called {stem}"
        yield Finding(Kind.NO_IMAGE, stem, text)


def _record(stem: str, image: Path, file: Path) -> tuple[dict[str, Any], Labels]:
    """The record of an image, of class 0 throughout, and its labels."""
    try:
        width, height = image_size(image)
    except ImageError as error:
        raise _Unusable(Kind.UNREADABLE_IMAGE, error) from None
    try:
        labels = read_labels(file)
    except ImageError as error:
        raise _Unusable(Kind.LABELS, error) from None
    if labels.shape != (height, width):
        text = f"{file} is {labels.shape[1]} x {labels.shape[0]} pixels, its image {image} {width}"
        raise _Unusable(Kind.IMAGE_SIZE, f"{text} x {height}")
    annotations = [annotation_of(rle, 0, id=key) for key, rle in label_rles(labels).items()]
    record = {"file_name": str(image), "image_id": stem, "height": height, "width": width}
    return record | {"annotations": annotations}, labels


def _take_classes(
    record: dict[str, Any], table: ClassTable, stem: str, file: Path
) -> Iterator[Finding]:
    """Give the annotations of a record their classes, listed by its image or its label image."""
    label_stem = _stem(file)
    for annotation in record["annotations"]:
        label = annotation["id"]
        number = table.numbers.get((stem, label), table.numbers.get((label_stem, label)))
        if number is None:
            text = f"label {annotation['id']} of {file} has no class; add a row to {table.file}"
            yield Finding(Kind.UNKNOWN_CATEGORY, f"{stem}:{annotation['id']}", text)
        else:
            annotation["category_id"] = number


def _pieces(stem: str, file: Path, labels: Labels) -> Iterator[Finding]:
    for number, count in labels_in_pieces(labels).items():
        text = f"label {number} of {file} is in {count} pieces; is it one instance?"
        yield Finding(Kind.IN_PIECES, f"{stem}:{number}", text)
