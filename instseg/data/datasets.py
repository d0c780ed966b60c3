"""Names of data sets: the built-in ones and any COCO-format set named in the configuration.

``coco:PATH/instances.json:IMAGE_ROOT`` in ``DATASETS.TRAIN`` or ``DATASETS.TEST`` is a data set
that needs no registration; without ``:IMAGE_ROOT`` the pictures lie beside the JSON file.
``youtubevis:PATH/videos.json:IMAGE_ROOT`` is the same for videos.
``coco_mini_{train,val}``, ``nuclei_{train,val}``, ``sbd_{train,val}``,
``voc_2012_instances_{train,val}``, ``cvppp_a1_{train,val,trainval}``,
``youtubevis_{2019,2021}_{train,val}`` and ``flying_chairs_{train,val}`` are looked for under
``$DETECTRON2_DATASETS`` (default ``datasets``), as Detectron2's own names are.
"""

import difflib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from instseg.data.consistency import coco_instances, likely_mistakes, sample_step
from instseg.data.findings import Level, Report
from instseg.data.presence import unusable_files
from instseg.data.readers import cvppp, flying_chairs, voc, youtube_vis
from instseg.data.readers.coco_check import check_coco
from instseg.data.readers.coco_records import coco_records, read_coco
from instseg.data.readers.json_files import file_of
from instseg.data.records import CheckedRecords
from instseg.data.synthetic import shapes, shapes_video
from instseg.data.synthetic.files import SIZES, is_elsewhere
from instseg.errors import ConfigError, DatasetError, short

logger = logging.getLogger(__name__)

_CHECK = "`instseg check-data`"
_COCO_PREFIX = "coco:"
_SYNTHETIC = (*shapes.SPLITS, *shapes.SUBSETS, *shapes_video.SPLITS)
_UNDER_ROOT = ("coco_mini", "nuclei")


def register_builtin_datasets() -> None:
    """Make the names that instseg provides known to Detectron2; those already known stay."""
    for name in _SYNTHETIC:
        if name not in DatasetCatalog:
            _register_shapes(name, shapes.DEFAULT_SIZE)
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    for folder in _UNDER_ROOT:
        for split in ("train", "val"):
            json_file = os.path.join(root, folder, f"instances_{split}.json")
            _register_coco(f"{folder}_{split}", json_file, os.path.join(root, folder, "images"))
    voc.register(root)
    youtube_vis.register_builtin(root)
    flying_chairs.register(root)
    cvppp.register(root)


def register_datasets(cfg: CfgNode) -> None:
    """Register ``coco:...`` names and apply ``SHAPES_SIZE`` of ``cfg.DATASETS``; repeatable."""
    size = cfg.DATASETS.SHAPES_SIZE
    if size not in SIZES:
        raise ConfigError(
            f"DATASETS.SHAPES_SIZE is {size}; expected {SIZES[0]} to {SIZES[-1]} pixels"
        )
    for name in _SYNTHETIC:
        if MetadataCatalog.get(name).get("size") != size:
            _register_shapes(name, size)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if not isinstance(name, str):
            raise ConfigError(f"DATASETS.TRAIN and DATASETS.TEST hold names, found {short(name)}")
        register_dataset(name)


def register_dataset(name: str) -> None:
    """Register a ``coco:...`` or ``youtubevis:...`` name; have records of others' sets checked.

    Raises:
        DatasetError: a name that is not complete.
    """
    if name.startswith(_COCO_PREFIX):
        _register_coco(name, *parse_coco_name(name))
    elif name.startswith(youtube_vis.PREFIX):
        youtube_vis.register(name, *parse_coco_name(name))
    elif name in DatasetCatalog:
        _adopt(name)


def _adopt(name: str) -> None:
    """Have the records of a data set that somebody else registered checked wherever they are read.

    The function that the name stands for is replaced, also for Detectron2; repeatable.
    """
    function = DatasetCatalog[name]
    module = str(getattr(function, "__module__", ""))
    if isinstance(function, CheckedRecords) or module.startswith("instseg."):
        return
    metadata = MetadataCatalog.get(name)
    file, root = (os.fspath(metadata.get(key, "")) for key in ("json_file", "image_root"))
    # Detectron2 lets ids occur twice in the files that are called so.
    if module == load_coco_json.__module__ and file and root and "minival" not in file:
        DatasetCatalog[name] = lambda: _load_coco(name, PathManager.get_local_path(file), root)
    else:
        DatasetCatalog[name] = CheckedRecords(name, function)


def is_from_users(name: str) -> bool:
    """Whether a data set is somebody's file or function, not made or read by a reader of ours."""
    return bool(MetadataCatalog.get(name).get("json_file")) or (
        name in DatasetCatalog and isinstance(DatasetCatalog[name], CheckedRecords)
    )


def parse_coco_name(name: str) -> tuple[str, str]:
    """``coco:PATH.json[:IMAGE_ROOT]``, or ``youtubevis:...`` → (JSON file, folder of the pictures).

    Raises:
        DatasetError: the name does not have that form.
    """
    prefix, _, rest = name.partition(":")
    parts = re.fullmatch(r"(.+?\.json)(?::(.*))?", rest, re.DOTALL)  # folders may end in .json too
    if parts is None:
        raise DatasetError(
            f"cannot read the data set name {name!r}; expected "
            f"{prefix}:PATH/instances.json:IMAGE_ROOT"
        )
    json_file, image_root = parts[1], parts[2] or os.path.dirname(parts[1]) or os.curdir
    return os.path.expanduser(json_file), os.path.expanduser(image_root)


def dataset_classes(name: str) -> list[str]:
    """Class names of a registered data set in the order of their ids, reading it if need be.

    Raises:
        DatasetError: unknown name, or a data set that cannot be read.
    """
    check_name(name)
    metadata = MetadataCatalog.get(name)
    if not hasattr(metadata, "thing_classes"):
        with reading_datasets([name]):
            DatasetCatalog.get(name)
    return list(metadata.get("thing_classes", []))


def class_difference(
    first: tuple[str, Sequence[str]], second: tuple[str, Sequence[str]]
) -> str | None:
    """What differs between two data sets, given as name and class names, if anything does."""
    for number, (one, other) in enumerate(zip_longest(first[1], second[1]), start=1):
        if one != other:
            return (
                f"the data sets {first[0]} and {second[0]} differ in their classes or in the order "
                f"of them: number {number} is {one!r} in the one, {other!r} in the other"
            )
    return None


@contextmanager
def reading_datasets(names: Sequence[str]) -> Iterator[None]:
    """Turns what Detectron2 raises about data it cannot find or use into a DatasetError."""
    listing = ", ".join(names)
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"data set {listing}: there is no file {error.filename}; set DETECTRON2_DATASETS to "
            "the folder that holds it"
        ) from None
    except AssertionError as error:
        reason = str(error)
        if reason.startswith("No valid data"):
            reason = _why_none_is_left(names)
        elif "cannot be set to a different value" in reason:
            reason = (
                "the name is in use for a set with other classes, or the file changed since it was "
                "read; use another name for one of them, or start Python anew"
            )
        raise DatasetError(f"data set {listing}: {reason}") from None


def _why_none_is_left(names: Sequence[str]) -> str:
    records = [record for name in names for record in DatasetCatalog.get(name)]
    annotated = sum(bool(record.get("annotations")) for record in records)
    return nothing_to_train_on(annotated, len(records))


def nothing_to_train_on(annotated: int, total: int) -> str:
    """Why a data set has no object to learn from, and what to do.

    Args:
        annotated: pictures with annotations.
        total: pictures.
    """
    crowds = ", but with crowds alone (iscrowd 1), which are not trained on" if annotated else ""
    return (
        f"{annotated} of {total} pictures are annotated{crowds}; to train on pictures without "
        "objects set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
    )


def check_name(name: str) -> None:
    """Raise a DatasetError with close names if ``name`` is not registered."""
    if name in DatasetCatalog:
        return
    close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "."
    raise DatasetError(
        f"no data set is called {name!r}{hint} A set of your own is written "
        "coco:PATH/instances.json:IMAGE_ROOT"
    )


def check_records(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> None:
    """Check that ``cfg`` can train on the records of the data set ``name``.

    The folders of the pictures are listed, no picture is opened.

    Raises:
        DatasetError: objects without a mask, or more pictures without a file than
            ``DATALOADER.MAX_UNREADABLE``.
        ConfigError: masks that ``INPUT.MASK_FORMAT`` does not suit.
    """
    if cfg.MODEL.MASK_ON:
        check_masks(name, records)
        if cfg.INPUT.MASK_FORMAT == "polygon" and not cfg.INPUT.SAMPLES:
            _check_polygons(name, records)
    check_files(name, records, cfg.DATALOADER.MAX_UNREADABLE)


def check_files(name: str, records: list[dict[str, Any]], most: int = 0) -> None:
    """Refuse records with more than ``most`` files, of pictures and flows, that are not there.

    Raises:
        DatasetError: with the first of them.
    """
    files = {record["file_name"] for record in records}
    for record in records:
        files.update(record.get("reference_files", ()), record.get("flow_files", ()))
    unusable = list(unusable_files(sorted(files)))
    if len(unusable) > most:
        first = ", ".join(f"{file} ({reason})" for file, reason in unusable[:3])
        raise DatasetError(
            f"data set {name}: {len(unusable)} of {len(files)} pictures have no file that can be "
            f"read, first {first}"
        )


def check_masks(name: str, records: list[dict[str, Any]]) -> None:
    """Refuse training records with an object that has no mask.

    Detectron2 accepts them and fails much later, inside the mask loss of some batch.

    Raises:
        DatasetError: with the pictures and annotations concerned.
    """
    bad = {
        record["file_name"]: annotation.get("id", "without id")
        for record in records
        for annotation in record.get("annotations", ())
        if not annotation.get("segmentation")
    }
    if bad:
        first = ", ".join(f"{file} (annotation {key})" for file, key in list(bad.items())[:3])
        raise DatasetError(
            f"data set {name}: {len(bad)} of {len(records)} pictures have objects without a "
            f"segmentation, first {first}; instance segmentation needs a polygon or RLE for each "
            "object"
        )


def _check_polygons(name: str, records: list[dict[str, Any]]) -> None:
    for record in records:
        for annotation in record.get("annotations", ()):
            if isinstance(annotation["segmentation"], dict) and not annotation.get("iscrowd", 0):
                raise ConfigError(
                    f"data set {name}: annotation {annotation.get('id', 'without id')} of "
                    f"{record['file_name']} is an RLE, INPUT.MASK_FORMAT is polygon; set "
                    "INPUT.MASK_FORMAT bitmask"
                )


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Give a set in COCO's format a name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Raises:
        DatasetError: the name is taken.
    """
    if name in DatasetCatalog:
        raise DatasetError(
            f"a data set is called {name!r} already; choose another name, or write "
            f"{_COCO_PREFIX}{json_file}:{image_root}, which needs none"
        )
    _register_coco(name, json_file, image_root)


def _register_shapes(name: str, size: int) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if name in shapes_video.SPLITS:
        DatasetCatalog.register(name, lambda: shapes_video.load(name, size))
    else:
        split, indices = shapes.SUBSETS.get(name, (name, None))
        DatasetCatalog.register(name, lambda: shapes.load(split, size, indices))
    classes = shapes.class_names(name)
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        # As `instseg shapes export` writes them.
        thing_dataset_id_to_contiguous_id={number + 1: number for number in range(len(classes))},
        evaluator_type="coco",
        size=size,
    )


def _register_coco(name: str, json_file: str, image_root: str) -> None:
    if name in DatasetCatalog:
        return
    DatasetCatalog.register(name, lambda: _load_coco(name, json_file, image_root))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def _load_coco(name: str, json_file: str, image_root: str) -> list[dict[str, Any]]:
    if not os.path.isfile(json_file):
        hint = (
            ""
            if name.startswith(_COCO_PREFIX)
            else "; set DETECTRON2_DATASETS to the folder that holds it"
        )
        raise DatasetError(f"data set {name}: there is no file {json_file}{hint}")
    if not (os.path.isdir(image_root) or is_elsewhere(image_root)):
        raise DatasetError(f"data set {name}: the picture folder {image_root} does not exist")
    where = file_of(name, json_file)
    content = read_coco(where, json_file, image_root)
    report = Report(check_coco(content, masks=False))
    error = next(report.lines(Level.ERROR), None)
    if error is not None:
        raise DatasetError(f"{where}: {error}; {_CHECK} shows all of it")
    step = sample_step(len(content.get("annotations", ())))
    mistakes = likely_mistakes(coco_instances(content, report, step))
    for line in (*report.warnings(), *mistakes):
        logger.warning("%s: %s", where, line)
    with reading_datasets([name]):
        return coco_records(name, content, image_root, report.left_out())
