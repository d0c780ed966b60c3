"""The classes of a model: the ids that results have for them, and their names."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from instseg.errors import short

_MOST = 100_000
"""Classes; more are a mistake or an attack."""
_LONGEST_NAME = 1000
"""Characters of a name; the rest is cut off."""
_LARGEST_ID = 2**53
"""Up to which every reader of JSON knows whole numbers exactly."""
_INVISIBLE = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Kinds of characters: control, half of a surrogate pair, separators of lines."""
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them."""


@dataclass(frozen=True)
class ClassCount:
    """Number of classes of a model, and the configuration key that says it."""

    key: str
    count: int


@dataclass(frozen=True)
class Categories:
    """The classes of a model, in the order of its class numbers.

    Whatever it is made of, it is valid: ids and names are as many, ids are distinct, names are one
    line of text (``?`` stands for what cannot be shown, ``class 3`` for a name without text).

    Attributes:
        ids: what results have as ``category_id``: those of the data set, or the class numbers where
            nobody knows them.
        names: what results have as ``category_name``.
        named: False where nobody knows the names; they are ``class 0``, ``class 1``, ...
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    named: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def unnamed(cls, count: int) -> "Categories":
        """``count`` classes of which nothing is known."""
        return cls(tuple(range(count)), tuple(map(_class_name, range(count))), named=False)

    @classmethod
    def of_names(cls, names: Iterable[str]) -> "Categories":
        """Classes of these names; their ids are their numbers."""
        cleaned = tuple(_clean(name, number) for number, name in enumerate(names))
        return cls(tuple(range(len(cleaned))), cleaned)

    @classmethod
    def of_coco(cls, entries: object, *, by_id: bool = False) -> "Categories":
        """What a file holds as categories, in the form of COCO.

        Args:
            entries: ``[{"id": ..., "name": ...}, ...]``, or anything else.
            by_id: class numbers follow the ids, as Detectron2 reads data sets, not the list.
        Raises:
            ValueError: no such list; the text says what was found.
        """
        if not isinstance(entries, list | tuple) or not 0 < len(entries) <= _MOST:
            raise ValueError(
                f'expected a list of {{"id": ..., "name": ...}}, found {short(entries)}'
            )
        found: dict[int, str] = {}
        for entry in entries:
            if not isinstance(entry, Mapping):
                raise ValueError(f'expected {{"id": ..., "name": ...}}, found {short(entry)}')
            key, name = _whole(entry.get("id")), entry.get("name")
            if key is None:
                raise ValueError(f"a category has the id {short(entry.get('id'))}, no whole number")
            if key in found:
                raise ValueError(f"two categories have the id {key}")
            if not isinstance(name, str):
                raise ValueError(f"category {key} has the name {short(name)}, which is no text")
            found[key] = name
        ids = tuple(sorted(found) if by_id else found)
        return cls(ids, tuple(_clean(found[key], number) for number, key in enumerate(ids)))

    @classmethod
    def of_metadata(cls, metadata: Any) -> "Categories | None":
        """Those of a data set, from its entry in Detectron2's catalog; None where it tells none."""
        names = metadata.get("thing_classes")
        if not names:
            return None
        found = cls.of_names(map(str, names))
        mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        ids = {int(number): _whole(int(key)) for key, number in mapping.items()}
        # Of a panoptic set it may have more.  Without one, Detectron2 counts from 0 as well.
        if len(ids) != len(mapping) or not all(ids.get(n) is not None for n in range(len(found))):
            return found
        return cls(tuple(ids[n] or 0 for n in range(len(found))), found.names)

    @classmethod
    def of_checkpoint(cls, content: Mapping[str, Any]) -> "Categories | None":
        """What weights say of their classes beside the tensors; None where they say nothing.

        Args:
            content: as :func:`instseg.checkpoint.reading.read_weights` gives it.  Of older files it
                has the names alone.
        Raises:
            ValueError: something else is in their place; the text says so.
        """
        entries = content.get("categories")
        if not _is_missing(entries):
            try:
                return cls.of_coco(entries)
            except ValueError as error:
                raise ValueError(f"categories in the checkpoint: {error}") from None
        names = content.get("class_names")
        if _is_missing(names):
            return None
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names in the checkpoint is no list of names")
        return cls.of_names(names[:_MOST])

    def as_coco(self) -> list[dict[str, Any]]:
        """``[{"id": ..., "name": ...}, ...]``: plain values, for files."""
        return [{"id": key, "name": name} for key, name in zip(self.ids, self.names, strict=True)]

    def id_of(self, number: int) -> int:
        """Category id of a class number; the number itself beyond the last class."""
        return self.ids[number] if 0 <= number < len(self.ids) else number

    def name_of(self, number: int) -> str:
        """Name of a class number."""
        return self.names[number] if 0 <= number < len(self.names) else _class_name(number)

    def number_of(self, category_id: int) -> int:
        """The class number that :meth:`id_of` gives ``category_id`` for."""
        return self.ids.index(category_id) if category_id in self.ids else category_id


OBJECT = Categories((1,), ("object",))
"""The one class of models that know no classes: any object."""


def _is_missing(value: object) -> bool:
    """Whether it says nothing; values of any type can stand in a file, also tensors."""
    return value is None or (isinstance(value, list | tuple | dict | str) and not value)


def _class_name(number: int) -> str:
    return f"class {number}"


def _clean(name: str, number: int) -> str:
    """One line of text that shows what it is."""
    characters = (
        "?" if unicodedata.category(c) in _INVISIBLE or c in _TURNING else c
        for c in name[:_LONGEST_NAME]
    )
    return "".join(characters).strip() or _class_name(number)


def _whole(value: object) -> int | None:
    """A whole number that files can hold, also one written as 7.0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LARGEST_ID <= value <= _LARGEST_ID or value != int(value):
        return None
    return int(value)
