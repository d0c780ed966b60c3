"""Read and check data sets once, and pass them on as objects.

:func:`load` turns a name of Detectron2's catalogue into a :class:`DataSet`.  As long as that object
lives, its files are opened again only if their size or time of modification changes.
"""

import difflib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from instseg.categories import Categories
from instseg.data import ground_truth
from instseg.data.findings import Report
from instseg.data.readers import coco_records
from instseg.data.records import CheckedRecords, Record
from instseg.errors import DatasetError
from instseg.files import stamp

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set that was read and checked.

    Attributes:
        name: in Detectron2's catalogue.
        records: one for each image, in Detectron2's standard format.  They are shared: change
            copies only.
        classes: names in the order of the class numbers; empty if the set has no classes.
        category_ids: class number → id in the files; empty if both are the same.
        categories: ``classes`` with their ids in results; None without classes.
        kind: ``evaluator_type`` of its metadata, by default "coco".
        files: the files that list its images or annotations; none for synthetic images and
            registered functions.
        image_root: folder that the names of the images are relative to, "" if unknown.
        is_from_users: whether it comes from a user's file or function, not from a reader of ours.
        annotated: whether there is a ground truth, possibly one without instances.
    """

    name: str
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    category_ids: dict[int, Any]
    categories: Categories | None
    kind: str
    files: tuple[str, ...]
    image_root: str
    is_from_users: bool
    annotated: bool
    _gt_file: str | None = None
    _origin: "DataSet | None" = None  # the cached set that this one was made from; kept alive

    @functools.cached_property
    def coco(self) -> COCO:
        """The ground truth for COCO's code; made once, without reading the files again.

        Raises:
            DatasetError: the classes have no names.
        """
        if self._gt_file is not None:
            return ground_truth.of_file(self.name, self._gt_file, self.image_root)
        if not self.classes:
            raise DatasetError(
                f"data set {self.name} has no class names; set them with "
                f"MetadataCatalog.get({self.name!r}).thing_classes = ['cat', 'dog']"
            )
        categories = [
            {"id": self.category_id(number), "name": name}
            for number, name in enumerate(self.classes)
        ]
        exact = self.is_from_users and bool(self.files)
        return ground_truth.of_records(
            self.records, categories, annotated=self.annotated, exact=exact
        )

    def category_id(self, number: int) -> Any:
        """The id of a class number in the files."""
        return self.category_ids.get(number, number)

    def copies(self) -> list[Record]:
        """Copies of the records, for code that may write into them."""
        return list(map(_copy, self.records))


class Content(NamedTuple):
    """The result of a reader.

    Attributes:
        records: one for each image.
        classes: id → name in the order of the class numbers; None if the metadata has them.
        annotated: whether there is a ground truth; None if that means any annotation at all.
    """

    records: Sequence[Record]
    classes: dict[Any, str] | None = None
    annotated: bool | None = None


class Source:
    """Entry of Detectron2's catalogue for a data set with a reader of ours.

    A call gives records that the caller may change.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Content],
        key: Sequence[Any] = (),
        files: Sequence[str] | Callable[[], Sequence[str]] = (),
        examine: Callable[[], tuple[Content, Report]] | None = None,
    ) -> None:
        """
        Args:
            name: of the data set.
            read: the reader.
            key: sources with equal keys and unchanged files have the same content.
            files: the files that list its images or annotations, or a function that finds them.
            examine: reads it for ``check-data``: gives what can be used and a report on everything
                that was found, where ``read`` raises.
        """
        self.name = name
        self.examine = examine
        self._files = files
        self._read = read
        self._key = tuple(key)

    def __call__(self) -> list[Record]:
        """The records, in Detectron2's standard format."""
        return load(self.name).copies()

    def load(self) -> DataSet:
        """The data set; see :func:`load`."""
        files = tuple(self._files() if callable(self._files) else self._files)
        key = (*self._key, *((file, *stamp(file)) for file in files))
        named = _CACHE.get((self.name, key))
        if named is not None:
            return named
        cached = _CACHE.get(key)
        if cached is None:
            content = self._read()
        else:
            classes = {cached.category_id(n): name for n, name in enumerate(cached.classes)}
            content = Content(cached.records, classes, cached.annotated)
        if content.classes is not None:
            MetadataCatalog.get(self.name).set(
                thing_classes=list(content.classes.values()),
                thing_dataset_id_to_contiguous_id={
                    category_id: number for number, category_id in enumerate(content.classes)
                },
            )
        dataset = _dataset(self.name, content, files=files, _origin=cached)
        _CACHE[self.name, key] = dataset
        _CACHE.setdefault(key, dataset)
        return dataset


# Weak references: the records of a training set must not stay in memory beside the loader's copy.
_CACHE: weakref.WeakValueDictionary[Any, DataSet] = weakref.WeakValueDictionary()


def load(name: str) -> DataSet:
    """The data set of a registered name; from the cache if it is still in use and unchanged.

    Raises:
        DatasetError: the name is unknown, or the data set cannot be read or used.
    """
    check_name(name)
    adopt(name)
    function = DatasetCatalog[name]
    with reading(name):
        return function.load() if isinstance(function, Source) else _of_function(name, function)


def load_all(names: Iterable[str]) -> list[DataSet]:
    """:func:`load` of each."""
    return [load(name) for name in names]


def coco_source(name: str, json_file: str, image_root: str) -> Source:
    """Source of a file in COCO's format, a local one or one that Detectron2 can fetch."""

    def read() -> Content:
        local_file = PathManager.get_local_path(json_file)
        return Content(*coco_records.load(name, local_file, image_root))

    return Source(name, read, ("coco", image_root), (json_file,))


def adopt(name: str) -> None:
    """Check the records of a data set that somebody else registered, wherever they are read.

    Replaces the function of the name in Detectron2's catalogue; repeatable.
    """
    function = DatasetCatalog[name]
    if isinstance(function, CheckedRecords | Source):
        return
    module = str(getattr(function, "__module__", ""))
    metadata = MetadataCatalog.get(name)
    file, root = (os.fspath(metadata.get(key, "")) for key in ("json_file", "image_root"))
    # Detectron2 allows repeated ids in files with "minival" in their names.
    if module == load_coco_json.__module__ and file and root and "minival" not in file:
        DatasetCatalog[name] = coco_source(name, file, root)
    else:
        DatasetCatalog[name] = CheckedRecords(name, function)


def check_name(name: str) -> None:
    """Raise a DatasetError with close names if ``name`` is not registered."""
    if name in DatasetCatalog:
        return
    close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "."
    raise DatasetError(
        f"no data set is called {name!r}{hint} A set of your own is written "
        "coco:PATH/instances.json:IMAGE_ROOT or labels:IMAGES:LABELS"
    )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn Detectron2's errors about data that it cannot find or use into a DatasetError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"data set {name}: there is no file {error.filename}; set DETECTRON2_DATASETS to "
            "the folder that holds it"
        ) from None
    except AssertionError as error:
        reason = str(error)
        if "cannot be set to a different value" in reason:
            reason = (
                "the name is in use for a set with other classes, or the file changed since it was "
                "read; use another name for one of them, or start Python anew"
            )
        raise DatasetError(f"data set {name}: {reason}") from None


def _of_function(name: str, function: CheckedRecords) -> DataSet:
    """The data set of a registered function; read again if its classes or JSON file change."""
    json_file = MetadataCatalog.get(name).get("json_file")
    key = (function, Categories.of_metadata(MetadataCatalog.get(name)), json_file)
    dataset = _CACHE.get(key)
    if dataset is None:
        dataset = _dataset(name, Content(function()), is_from_users=True)
        _CACHE[key] = dataset
    return dataset


def _dataset(name: str, content: Content, **fields: Any) -> DataSet:
    """Complete content with the metadata of the name."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    numbers = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    annotated = content.annotated
    if annotated is None:
        annotated = any(record.get("annotations") for record in content.records)
    if not fields.get("files") and json_file is not None:
        fields["_gt_file"] = os.fspath(json_file)
    return DataSet(
        name=name,
        records=tuple(content.records),
        classes=tuple(metadata.get("thing_classes") or ()),
        category_ids={number: category_id for category_id, number in numbers.items()},
        categories=Categories.of_metadata(metadata),
        kind=metadata.get("evaluator_type", "coco"),
        image_root=os.fspath(metadata.get("image_root") or ""),
        annotated=annotated,
        **{"files": (), "is_from_users": bool(json_file), **fields},
    )


def _copy(record: Record) -> Record:
    copy = dict(record)
    if "annotations" in record:
        copy["annotations"] = [_copy_annotation(entry) for entry in record["annotations"]]
    return copy


def _copy_annotation(annotation: dict[str, Any]) -> dict[str, Any]:
    """A copy with its own RLE and keypoints, since Detectron2 writes into both."""
    copy = dict(annotation)
    if isinstance(copy.get("segmentation"), dict):
        copy["segmentation"] = dict(copy["segmentation"])
    if "keypoints" in copy:
        copy["keypoints"] = list(copy["keypoints"])
    return copy
