"""Findings about data sets: their kinds, their consequences, and their messages."""

import enum
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Level(enum.Enum):
    """The consequence of a finding."""

    ERROR = "error"
    """The data set is refused."""
    WARNING = "warning"
    """The data set is used without the instance, or measurements on it mislead."""
    NOTE = "note"
    """The data set is used as it is."""


class Kind(enum.Enum):
    """Kinds of findings, the worst first."""

    FORMAT = "not in the expected format", Level.ERROR
    CATEGORY_ID = "duplicate category id", Level.ERROR
    IMAGE_ID = "duplicate image id", Level.ERROR
    ANNOTATION_ID = "duplicate annotation id", Level.ERROR
    UNKNOWN_CATEGORY = "unknown category", Level.ERROR
    INVERTED_BOX = "inverted box", Level.ERROR
    RLE = "wrong RLE", Level.ERROR
    NO_MASK = "instance without a mask", Level.ERROR
    NO_INSTANCE = "nothing to train on", Level.ERROR
    CLASSES = "other classes than the first set", Level.ERROR
    MISSING_IMAGE = "missing image", Level.ERROR
    UNREADABLE_IMAGE = "unreadable image", Level.ERROR
    IMAGE_SIZE = "image of another size", Level.ERROR
    LABELS = "label image that cannot be used", Level.ERROR
    SAME_STEM = "two files of one stem", Level.ERROR
    NO_LABELS = "image without labels", Level.WARNING
    NO_IMAGE = "labels without an image", Level.WARNING
    IN_PIECES = "label in several pieces", Level.WARNING
    DEPTH = "more than 8 bits per channel", Level.WARNING
    CHANNELS = "other channels than grey or colours", Level.WARNING
    UNKNOWN_IMAGE = "unknown image id", Level.WARNING
    FEW_POINTS = "polygon without 3 points", Level.WARNING
    NOT_FINITE = "NaN or infinity", Level.WARNING
    OUTSIDE = "outside the image", Level.WARNING
    REPEATED_FILE = "file listed twice", Level.WARNING
    SHARED_ID = "image ids that no evaluation can use", Level.WARNING
    LEAKAGE = "image of another set as well", Level.WARNING
    SAME_BOX = "the same box for most", Level.WARNING
    RELATIVE = "coordinates within 0 to 1", Level.WARNING
    BOXES = "boxes in another form", Level.WARNING
    MOST_CROWDS = "mostly crowds", Level.WARNING
    AREAS = "areas of something else", Level.WARNING
    MANY_INSTANCES = "more instances than are detected", Level.WARNING
    BOX_MISMATCH = "box and mask differ", Level.NOTE
    AREA_MISMATCH = "area and mask differ", Level.NOTE
    POLYGON_PART = "part without 3 points", Level.NOTE
    EMPTY_BOX = "box without area", Level.NOTE
    TINY_MASK = "mask below one pixel", Level.NOTE
    PARTLY_OUTSIDE = "partly outside the image", Level.NOTE
    REPEATED_NAME = "two classes of one name", Level.NOTE
    NUMBER = "number written another way", Level.NOTE
    POINTS = "outline written another way", Level.NOTE
    NO_BOX = "box made from the mask", Level.NOTE
    BACKSLASH = "backslash in a file name", Level.NOTE
    REPEATED_RECORD = "record listed again", Level.NOTE

    def __init__(self, text: str, level: Level) -> None:
        self.text = text
        self.level = level


LEFT_OUT = frozenset({Kind.UNKNOWN_IMAGE, Kind.FEW_POINTS, Kind.NOT_FINITE, Kind.OUTSIDE})
"""Instances with one of these are not used."""


class Finding(NamedTuple):
    """One problem of the entry ``id`` (of an image, category or annotation)."""

    kind: Kind
    id: int | float | str | None
    message: str


class Report:
    """Findings by kind.

    Attributes:
        ids: kind → ids of all entries concerned; kinds in the order in which they were found.
        examples: kind → message of its first finding.
    """

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.ids: dict[Kind, list[Any]] = {}
        self.examples: dict[Kind, str] = {}
        self.add(findings)

    def add(self, findings: Iterable[Finding]) -> None:
        """Add more findings."""
        for kind, key, message in findings:
            self.ids.setdefault(kind, []).append(key)
            self.examples.setdefault(kind, message)

    def has(self, level: Level) -> bool:
        """Whether there is a finding of that level."""
        return any(kind.level is level for kind in self.ids)

    def left_out(self) -> set[Any]:
        """Ids of the annotations that are not used."""
        return {key for kind in LEFT_OUT for key in self.ids.get(kind, ())}

    def lines(self, level: Level) -> Iterator[str]:
        """The first message of each kind of that level, with the number of further ones."""
        for kind, ids in self.ids.items():
            if kind.level is level:
                rest = first_ids([key for key in ids[1:] if key is not None])
                more = f" (and {len(ids) - 1} more{f': {rest}' if rest else ''})" if ids[1:] else ""
                yield self.examples[kind] + more

    def warnings(self) -> Iterator[str]:
        """The warnings of :meth:`lines`; those about unused instances begin with "left out"."""
        kinds = [kind for kind in self.ids if kind.level is Level.WARNING]
        for kind, line in zip(kinds, self.lines(Level.WARNING), strict=True):
            yield f"left out: {line}" if kind in LEFT_OUT else line


def first_ids(ids: list[Any], count: int = 5) -> str:
    """The first ``count`` ids as text, for a message."""
    shown = ", ".join(str(key) for key in ids[:count])
    return f"{shown}, ..." if ids[count:] else shown
