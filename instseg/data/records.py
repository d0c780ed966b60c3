"""Check the records of a function that somebody registered with Detectron2, and give them one form.

Detectron2 itself reads records from the catalogue in many places and expects a different form in
each.  :class:`CheckedRecords` therefore replaces the function there, so that all see the same.
"""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from torch.utils.data import Dataset

from instseg.data.annotations import Fault, standard_annotation
from instseg.data.consistency import likely_mistakes, record_instances, sample_step
from instseg.data.findings import LEFT_OUT, Finding, Kind, Level, Report
from instseg.data.image_headers import MAX_PIXELS
from instseg.data.images import image_size
from instseg.data.readers.json_files import size_in_pixels, whole
from instseg.data.synthetic.files import is_elsewhere
from instseg.errors import DatasetError, ImageError, short

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_PATHS = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


class CheckedRecords:
    """Replaces a registered function in the catalogue.

    A call gives a list of records in Detectron2's standard form: paths as text, ``height``,
    ``width`` and ``image_id`` in each, ``annotations`` in all or none, and annotations as
    :func:`~instseg.data.annotations.standard_annotation` makes them.  The function's own records
    are not modified.  Repeated ``image_id`` are allowed for training, see :func:`check_image_ids`.
    """

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        """
        Args:
            name: of the data set.
            function: the registered one; returns records in a list or any other iterable.
        """
        self.name = name
        self._function = function
        self._iterator: Iterator[Any] | None = None
        self._iterator_records: list[Any] = []
        self._logged_lines: set[str] = set()
        self._size = functools.cache(_size)  # keeps sizes from one call to the next

    def __call__(self) -> list[Record]:
        """The records, with a warning of each kind of finding.

        Raises:
            DatasetError: no model can be trained or evaluated on a record; the message names it.
        """
        records, report = self.examine()
        error = next(report.lines(Level.ERROR), None)
        if error is not None:
            raise DatasetError(f"data set {self.name}: {error}")
        step = sample_step(sum(len(record.get("annotations", ())) for record in records))
        mistakes = likely_mistakes(record_instances(records, step))
        for line in (*report.warnings(), *mistakes):
            self._log_once(line)
        return records

    def examine(self) -> tuple[list[Record], Report]:
        """The usable records, and a report on everything that was found."""
        report = Report([])
        given = self._given()
        classes = _classes(self.name)
        records = []
        for index, entry in enumerate(given):
            try:
                record = _standard_record(entry, f"record {index}", self._size)
            except Fault as fault:
                report.add([Finding(fault.kind, index, str(fault))])
                continue
            report.add(_take_annotations(record, classes, f"record {index}", index))
            records.append(record)
        annotated = any("annotations" in record for record in records)
        if any(record.get("annotations") for record in records):
            report.add(_class_problems(self.name, classes))
        for record in records if annotated else ():
            record.setdefault("annotations", [])
        report.add(image_id_problems(records))
        self._number(records)
        return records, report

    def _given(self) -> list[Any]:
        given = self._function()
        if isinstance(given, Iterator):  # an iterator gives its records only once
            if given is not self._iterator:
                self._iterator, self._iterator_records = given, list(given)
            given = self._iterator_records
        elif isinstance(given, Dataset) and hasattr(given, "__len__"):
            given = [given[index] for index in range(len(given))]
        elif isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            raise DatasetError(
                f"data set {self.name}: its function gives {short(given)}; expected a list of "
                "records, one dict for each image"
            )
        records = list(given)
        if not records:
            raise DatasetError(f"data set {self.name}: its function gives no records")
        return records

    def _number(self, records: list[Record]) -> None:
        """Give an ``image_id`` to records without one."""
        used_ids = {record["image_id"] for record in records}
        free_ids = (number for number in itertools.count() if number not in used_ids)
        without_id = [record for record in records if record["image_id"] is None]
        for record, image_id in zip(without_id, free_ids, strict=False):
            record["image_id"] = image_id
        if without_id:
            line = f"{len(without_id)} of {len(records)} records have no image_id: numbered"
            self._log_once(line)

    def _log_once(self, line: str) -> None:
        if line not in self._logged_lines:
            self._logged_lines.add(line)
            logger.warning("data set %s: %s (said once)", self.name, line)


def image_id_problems(records: Sequence[Record]) -> Iterator[Finding]:
    """Image ids that an evaluation cannot use; training ignores them."""
    first_files: dict[Any, str] = {}
    id_types: set[type] = set()
    for record in records:
        key, file = record.get("image_id"), record["file_name"]
        id_types.add(str if isinstance(key, str) else type(key))
        if key is None:
            continue
        if key in first_files:
            is_same_file = file == first_files[key]
            kind = Kind.REPEATED_RECORD if is_same_file else Kind.SHARED_ID
            files = f"both {file}" if is_same_file else f"{first_files[key]} and {file}"
            message = f"two records have the image_id {key!r}, {files}"
            yield Finding(kind, key, f"{message}; training takes that, an evaluation does not")
        first_files.setdefault(key, file)
    if str in id_types and len(id_types) > 1:
        message = (
            "some image_id are numbers, others text or missing; training takes that, an "
            "evaluation needs one of the two"
        )
        yield Finding(Kind.SHARED_ID, None, message)


def check_image_ids(name: str, records: Sequence[Record]) -> None:
    """Refuse records whose images an evaluation cannot tell apart.

    Raises:
        DatasetError: an ``image_id`` occurs twice, or some are numbers and others text.
    """
    problem = next(image_id_problems(records), None)
    if problem is not None:
        raise DatasetError(
            f"data set {name}: {problem.message}; to evaluate or predict, list each image once, "
            "with an id of its own"
        )


def _standard_record(given: Any, where: str, size: Callable[[str], tuple[int, int]]) -> Record:
    """A copy with paths as text, whole numbers, and a size.

    Args:
        where: beginning of messages.
        size: gives width and height of an image file.
    Raises:
        Fault: the record names no image, or its image has no usable size.
    """
    if not isinstance(given, Mapping):
        raise Fault(Kind.FORMAT, f"{where} is {short(given)}; expected a dict")
    record = {str(key): value for key, value in given.items()}
    for key in _PATHS:
        if isinstance(record.get(key), os.PathLike):
            record[key] = os.fspath(record[key])
    file = record.get("file_name")
    if not isinstance(file, str) or not file:
        raise Fault(
            Kind.FORMAT, f"{where} has file_name {short(file)}; expected the path of an image"
        )
    where = f"{where} ({file})"
    key = record["image_id"] = whole(record.get("image_id"))
    if isinstance(key, str):
        record["image_id"] = str(key)
    elif key is not None and type(key) is not int:
        text = f"{where} has image_id {short(key)}; expected a whole number or text"
        raise Fault(Kind.FORMAT, text)
    if any(record.get(side) is None for side in ("height", "width")):
        try:
            record["width"], record["height"] = size(file)
        except Fault as fault:
            raise Fault(fault.kind, f"{where} has no height and width{fault}") from None
    for side in ("height", "width"):
        record[side] = pixels = size_in_pixels(record[side])
        if type(pixels) is not int or pixels < 1:
            raise Fault(Kind.FORMAT, f"{where} has {side} {short(pixels)}; expected pixels")
    if record["height"] * record["width"] > MAX_PIXELS:
        text = f"{where} is said to be {record['width']} x {record['height']} pixels; expected at "
        raise Fault(Kind.FORMAT, f"{text}most {MAX_PIXELS} pixels in all")
    return record


def _size(file: str) -> tuple[int, int]:
    if is_elsewhere(file):
        raise Fault(Kind.FORMAT, "; add those of the image")
    try:
        return image_size(file)
    except ImageError as error:
        text = f", and its image does not tell: {error}"
        raise Fault(Kind.UNREADABLE_IMAGE, text) from None


def _take_annotations(
    record: Record, classes: list[str] | None, where: str, index: int
) -> Iterator[Finding]:
    """Replace the annotations of a record by standard ones."""
    where = f"{where} ({record['file_name']})"
    given = record.pop("annotations", None)
    if given is None:
        return
    if not isinstance(given, list | tuple):
        message = f"{where} has annotations {short(given)}; expected a list of dicts"
        yield Finding(Kind.FORMAT, index, message)
        given = ()
    record["annotations"] = []
    for number, entry in enumerate(given):
        problems: list[tuple[Kind, str]] = []
        key = entry.get("id") if isinstance(entry, Mapping) else None
        key = f"{index}:{number}" if key is None else key
        try:
            annotation, problems = standard_annotation(
                entry, record["height"], record["width"], classes
            )
            if not any(kind in LEFT_OUT for kind, _ in problems):
                record["annotations"].append(annotation)
        except Fault as fault:
            problems = [(fault.kind, str(fault))]
        for kind, text in problems:
            yield Finding(kind, key, f"annotation {number} of {where}: {text}")


def _classes(name: str) -> list[str] | None:
    """Class names of a data set; None if the metadata has none."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    if isinstance(classes, list | tuple) and all(isinstance(entry, str) for entry in classes):
        return list(classes) or None
    return None


def _class_problems(name: str, classes: list[str] | None) -> Iterator[Finding]:
    metadata = MetadataCatalog.get(name)
    if classes is None:
        given = metadata.get("thing_classes")
        what = "are not set" if given is None else f"are {short(given)}"
        message = (
            f"its thing_classes {what}; name the classes in the order of category_id, from 0 on: "
            f"MetadataCatalog.get({name!r}).thing_classes = ['cat', 'dog']"
        )
        yield Finding(Kind.FORMAT, None, message)
        return
    numbers = metadata.get("thing_dataset_id_to_contiguous_id")
    # Panoptic sets may have further ids here.
    if numbers is not None and not set(range(len(classes))) <= set(numbers.values()):
        message = (
            f"its thing_dataset_id_to_contiguous_id is {short(numbers)}; expected one id for each "
            f"category_id from 0 to {len(classes) - 1}"
        )
        yield Finding(Kind.FORMAT, None, message)
