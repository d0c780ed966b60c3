"""Data sets made of records, which need not be registered."""

from collections.abc import Sequence
from typing import Any

from instseg.categories import Categories
from instseg.data.dataset import DataSet
from instseg.data.findings import Report


def data_set(
    records: Sequence[dict[str, Any]], classes: Sequence[str] = ("a", "b"), kind: str = "coco"
) -> DataSet:
    """A data set of these records, as if it had been read and checked."""
    return DataSet(
        name="test",
        records=tuple(records),
        classes=tuple(classes),
        category_ids={},
        categories=Categories.of_names(classes),
        kind=kind,
        files=(),
        image_root="",
        is_from_users=False,
        report=Report([]),
        annotated=True,
    )
