"""The classes of label images, in a CSV file.

The header names the columns ``file``, ``label`` and ``class`` in any order; other columns are
ignored.  ``file`` is the stem of the image, or the name of the image or of its label image.  A file
may list more images than a data set has, so one serves training and validation.  Classes are
numbered in alphabetical order::

    file,label,class
    plate1_A01,1,mitotic
    plate1_A01,2,interphase
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from instseg.data.suffixes import IMAGE_SUFFIXES
from instseg.errors import DatasetError, short

_COLUMNS = ("file", "label", "class")
_LARGEST = 50_000_000
"""Bytes; a larger file is no list of classes."""


class ClassTable(NamedTuple):
    """The classes of labels.

    Attributes:
        file: it was read from.
        classes: id from 1 → name.
        numbers: stem and label → class number from 0.
    """

    file: str
    classes: dict[int, str]
    numbers: dict[tuple[str, int], int]


def read_classes(name: str, file: str) -> ClassTable:
    """Read a CSV file with comma, semicolon or tab, in UTF-8.

    Args:
        name: of the data set, for messages.
    Raises:
        DatasetError: the file is missing, lacks a column or row, or contradicts itself.
    """
    try:
        rows = dict(_rows(file))
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DatasetError(f"data set {name}: the list of classes {file}: {reason}") from None
    names = sorted(set(rows.values()))
    numbers = {key: names.index(value) for key, value in rows.items()}
    return ClassTable(file, dict(enumerate(names, start=1)), numbers)


def _rows(file: str) -> Iterator[tuple[tuple[str, int], str]]:
    """Stem and label, and the name of the class."""
    with open(file, "rb") as opened:
        content = opened.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    header = lines.readline()
    delimiter = max(",;\t", key=header.count)
    cells = next(csv.reader([header], delimiter=delimiter), [])
    columns = [column.strip().lower() for column in cells]
    if not set(_COLUMNS) <= set(columns):
        raise ValueError(f"its first line is {short(header.strip())}; expected file,label,class")
    numbers = [columns.index(column) for column in _COLUMNS]
    classes_so_far: dict[tuple[str, int], str] = {}
    for number, row in enumerate(csv.reader(lines, delimiter=delimiter), start=2):
        if not any(cell.strip() for cell in row):
            continue
        cells = [row[column].strip() if column < len(row) else "" for column in numbers]
        image, label, kind = cells
        if not all(cells) or not label.isdecimal() or not int(label):
            raise ValueError(
                f"line {number} is {short(row)}; expected the name of an image, its label from 1 "
                "on, and a class"
            )
        key = _stem(image), int(label)
        if classes_so_far.setdefault(key, kind) != kind:
            raise ValueError(
                f"line {number} says that label {label} of {image} is {short(kind)}, an earlier "
                f"line {short(classes_so_far[key])}"
            )
        yield key, kind
    if not classes_so_far:
        raise ValueError("it has no rows below its header")


def _stem(name: str) -> str:
    """The stem of a file name; anything else than an extension of images stays."""
    path = Path(name.replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
    return stem.removesuffix(".ome")
