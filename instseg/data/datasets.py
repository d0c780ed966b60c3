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
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from instseg.data import cvppp, flying_chairs, shapes, shapes_video, voc, youtube_vis
from instseg.errors import ConfigError, DatasetError

_COCO_PREFIX = "coco:"
_SYNTHETIC = (*shapes.SPLITS, *shapes.SUBSETS, *shapes_video.SPLITS)
_UNDER_ROOT = ("coco_mini", "nuclei")
_MIN_SHAPES_SIZE = 16


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
    if size < _MIN_SHAPES_SIZE:
        raise ConfigError(
            f"DATASETS.SHAPES_SIZE is {size}; expected at least {_MIN_SHAPES_SIZE} pixels"
        )
    for name in _SYNTHETIC:
        if MetadataCatalog.get(name).get("size") != size:
            _register_shapes(name, size)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if not isinstance(name, str):
            raise ConfigError(f"DATASETS.TRAIN and DATASETS.TEST hold names, found {name!r}")
        if name.startswith(_COCO_PREFIX):
            _register_coco(name, *parse_coco_name(name))
        elif name.startswith(youtube_vis.PREFIX):
            youtube_vis.register(name, *parse_coco_name(name))


def parse_coco_name(name: str) -> tuple[str, str]:
    """``coco:PATH.json[:IMAGE_ROOT]``, or ``youtubevis:...`` → (JSON file, folder of the pictures).

    Raises:
        DatasetError: the name does not have that form.
    """
    prefix, _, rest = name.partition(":")
    json_file, separator, image_root = rest.partition(".json")
    if not json_file or not separator or (image_root and not image_root.startswith(":")):
        raise DatasetError(
            f"cannot read the data set name {name!r}; expected "
            f"{prefix}:PATH/instances.json:IMAGE_ROOT"
        )
    json_file += separator
    return json_file, image_root.removeprefix(":") or os.path.dirname(json_file)


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


@contextmanager
def reading_datasets(names: Iterable[str]) -> Iterator[None]:
    """Turns what Detectron2 raises about data it cannot find or use into a DatasetError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"data set {', '.join(names)}: there is no file {error.filename}; set "
            "DETECTRON2_DATASETS to the folder that holds it"
        ) from None
    except AssertionError as error:
        raise DatasetError(f"data set {', '.join(names)}: {error}") from None


def check_name(name: str) -> None:
    """Raise a DatasetError with close names if ``name`` is not registered."""
    if name in DatasetCatalog:
        return
    close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise DatasetError(
        f"no data set is called {name!r}{hint} A set of your own is written "
        "coco:PATH/instances.json:IMAGE_ROOT"
    )


def check_masks(name: str, records: list[dict[str, Any]]) -> None:
    """Refuse training records with an object that has no mask.

    Detectron2 accepts them and fails much later, inside the mask loss of some batch.

    Raises:
        DatasetError: with the pictures concerned.
    """
    bad = [
        record["file_name"]
        for record in records
        if any(not annotation.get("segmentation") for annotation in record.get("annotations", ()))
    ]
    if bad:
        raise DatasetError(
            f"data set {name}: {len(bad)} of {len(records)} pictures have objects without a "
            "segmentation, "
            f"first {', '.join(bad[:3])}; instance segmentation needs a polygon or RLE for each "
            "object"
        )


def _register_shapes(name: str, size: int) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if name in shapes_video.SPLITS:
        DatasetCatalog.register(name, lambda: shapes_video.load(name, size))
    else:
        split, indices = shapes.SUBSETS.get(name, (name, None))
        DatasetCatalog.register(name, lambda: shapes.load(split, size, indices))
    MetadataCatalog.get(name).set(
        thing_classes=shapes.class_names(name), evaluator_type="coco", size=size
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
    if not os.path.isdir(image_root):
        raise DatasetError(f"data set {name}: the picture folder {image_root} does not exist")
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"data set {name}: {json_file} is not JSON: {error}") from None
    keys = content if isinstance(content, dict) else {}
    missing = [key for key in ("images", "categories") if key not in keys]
    if missing:
        raise DatasetError(
            f"data set {name}: {json_file} has no {' and no '.join(missing)}; expected the COCO "
            "instance format"
        )
    del content
    try:
        return load_coco_json(json_file, image_root, name)
    except (KeyError, AssertionError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"data set {name}: {json_file} is not in COCO format: {error!r}"
        ) from None
