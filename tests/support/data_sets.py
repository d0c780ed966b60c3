"""Data sets made of records, without a name that anybody has to register."""

from collections.abc import Sequence
from typing import Any

from instseg.categories import Categories
from instseg.data.dataset import DataSet
from instseg.data.findings import Report


def data_set(
    records: Sequence[dict[str, Any]], classes: Sequence[str] = ("a", "b"), kind: str = "coco"
) -> DataSet:
    """One that was read and found sound."""
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
