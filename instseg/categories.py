"""The classes of a model: their ids in results, and their names."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from instseg.errors import short

_MAX_CLASSES = 100_000
"""More classes are a mistake or an attack."""
_LONGEST_NAME = 1000
"""Characters of a name; the rest is cut off."""
_LARGEST_ID = 2**53
"""Every reader of JSON reads whole numbers up to this one exactly."""
_INVISIBLE = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Unicode categories: control, half of a surrogate pair, line and paragraph separators."""
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them."""


@dataclass(frozen=True)
class ClassCount:
    """Number of classes of a model, and the configuration key that holds it."""

    key: str
    count: int


@dataclass(frozen=True)
class Categories:
    """The classes of a model, in the order of its class numbers.

    It is always valid: there are as many ids as names, ids are distinct, and each name is one line
    of text (``?`` replaces characters that cannot be shown, ``class 3`` a name without text).

    Attributes:
        ids: ``category_id`` in results: the ids of the data set, or the class numbers if these are
            unknown.
        names: ``category_name`` in results.
        named: False if the names are unknown; they are ``class 0``, ``class 1``, ... then.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    named: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def unnamed(cls, count: int) -> "Categories":
        """``count`` classes with unknown names and ids."""
        return cls(tuple(range(count)), tuple(map(_class_name, range(count))), named=False)

    @classmethod
    def of_names(cls, names: Iterable[str]) -> "Categories":
        """Classes with these names; their ids are their numbers."""
        cleaned = tuple(_clean(name, number) for number, name in enumerate(names))
        return cls(tuple(range(len(cleaned))), cleaned)

    @classmethod
    def of_coco(cls, entries: object, *, by_id: bool = False) -> "Categories":
        """Classes from the categories of a file in COCO's form.

        Args:
            entries: ``[{"id": ..., "name": ...}, ...]``; anything else is refused.
            by_id: order the classes by id, as Detectron2 does for data sets, not as in the list.
        Raises:
            ValueError: ``entries`` is no such list; the text says what was found.
        """
        if not isinstance(entries, list | tuple) or not 0 < len(entries) <= _MAX_CLASSES:
            raise ValueError(
                f'expected a list of {{"id": ..., "name": ...}}, found {short(entries)}'
            )
        names: dict[int, str] = {}
        for entry in entries:
            if not isinstance(entry, Mapping):
                raise ValueError(f'expected {{"id": ..., "name": ...}}, found {short(entry)}')
            key, name = _whole(entry.get("id")), entry.get("name")
            if key is None:
                raise ValueError(f"a category has the id {short(entry.get('id'))}, no whole number")
            if key in names:
                raise ValueError(f"two categories have the id {key}")
            if not isinstance(name, str):
                raise ValueError(f"category {key} has the name {short(name)}, which is no text")
            names[key] = name
        ids = tuple(sorted(names) if by_id else names)
        return cls(ids, tuple(_clean(names[key], number) for number, key in enumerate(ids)))

    @classmethod
    def of_metadata(cls, metadata: Any) -> "Categories | None":
        """The classes in the metadata of a data set; None if there are none."""
        names = metadata.get("thing_classes")
        if not names:
            return None
        named = cls.of_names(map(str, names))
        mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        ids = {int(number): _whole(int(key)) for key, number in mapping.items()}
        # A panoptic set may map further ids.  Without a mapping Detectron2 also counts from 0.
        if len(ids) != len(mapping) or not all(ids.get(n) is not None for n in range(len(named))):
            return named
        return cls(tuple(ids[n] or 0 for n in range(len(named))), named.names)

    @classmethod
    def of_checkpoint(cls, content: Mapping[str, Any]) -> "Categories | None":
        """The classes that a checkpoint stores beside its weights; None if it stores none.

        Args:
            content: from :func:`instseg.checkpoint.reading.read_weights`; older files have names
                but no ids.
        Raises:
            ValueError: the entry holds something else; the text says what.
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
        return cls.of_names(names[:_MAX_CLASSES])

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
        """Class number of a category id; the inverse of :meth:`id_of`."""
        return self.ids.index(category_id) if category_id in self.ids else category_id


OBJECT = Categories((1,), ("object",))
"""The single class of models without classes."""


def _is_missing(value: object) -> bool:
    """Whether an entry is missing or empty; a file may hold values of any type, also tensors."""
    return value is None or (isinstance(value, list | tuple | dict | str) and not value)


def _class_name(number: int) -> str:
    return f"class {number}"


def _clean(name: str, number: int) -> str:
    """The name as one line of visible text."""
    characters = (
        "?" if unicodedata.category(c) in _INVISIBLE or c in _TURNING else c
        for c in name[:_LONGEST_NAME]
    )
    return "".join(characters).strip() or _class_name(number)


def _whole(value: object) -> int | None:
    """A whole number that JSON can hold, also one written as 7.0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LARGEST_ID <= value <= _LARGEST_ID or value != int(value):
        return None
    return int(value)
