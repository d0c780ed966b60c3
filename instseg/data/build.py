"""Register the names of data sets, and collect and check the records to train on.

``coco:PATH/instances.json:IMAGE_ROOT`` in ``DATASETS.TRAIN`` or ``DATASETS.TEST`` names a data set
without registration.  ``:IMAGE_ROOT`` may be missing if the images lie beside the JSON file.
``youtubevis:PATH/videos.json:IMAGE_ROOT`` is the same for videos.  ``labels:IMAGES:LABELS`` names
two folders: images and label images (:mod:`instseg.data.readers.labels`).

The other names are those of the synthetic sets, and ``coco_mini_{train,val}``,
``nuclei_{train,val}``, ``sbd_{train,val}``, ``voc_2012_instances_{train,val}``,
``cvppp_a1_{train,val,trainval}``, ``youtubevis_{2019,2021}_{train,val}`` and
``flying_chairs_{train,val}``, whose files lie under ``$DETECTRON2_DATASETS`` (default
``datasets``), like those of Detectron2's own sets.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, Protocol

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)

from instseg.data.dataset import Content, DataSet, Source, adopt, coco_source
from instseg.data.presence import unusable_files
from instseg.data.readers import cvppp, flying_chairs, labels, voc, youtube_vis
from instseg.data.readers.coco_records import PREFIX as COCO_PREFIX
from instseg.data.records import Record
from instseg.data.synthetic import shapes, shapes_video
from instseg.errors import ConfigError, DatasetError

_SYNTHETIC = (*shapes.SPLITS, *shapes.SUBSETS, *shapes_video.SPLITS)
_UNDER_ROOT = ("coco_mini", "nuclei")


def register_builtin_datasets() -> None:
    """Register instseg's data sets with Detectron2; names that exist already stay as they are."""
    for name in _SYNTHETIC:
        if name not in DatasetCatalog:
            _register_shapes(name, shapes.DEFAULT_SIZE)
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    for folder in _UNDER_ROOT:
        for split in ("train", "val"):
            json_file = os.path.join(root, folder, f"instances_{split}.json")
            _register_coco(f"{folder}_{split}", json_file, os.path.join(root, folder, "images"))
    for split in ("train", "val"):
        folder = os.path.join(root, "sbd")
        _register_voc(f"sbd_{split}", voc.load_sbd, folder, split, f"{split}.txt")
        folder, listing = os.path.join(root, "VOC2012"), f"ImageSets/Segmentation/{split}.txt"
        _register_voc(f"voc_2012_instances_{split}", voc.load_voc, folder, split, listing)
        _register_chairs(f"flying_chairs_{split}", os.path.join(root, flying_chairs.FOLDER), split)
        for year in youtube_vis.YEARS:
            folder, file = os.path.join(root, f"ytvis_{year}"), youtube_vis.FILES[split]
            _register_youtube_vis(
                f"youtubevis_{year}_{split}",
                os.path.join(folder, f"{file}.json"),
                os.path.join(folder, file, "JPEGImages"),
            )
    for split in cvppp.SPLITS:
        _register_cvppp(f"cvppp_a1_{split}", os.path.join(root, "cvppp", "A1"), split)


def register_datasets(cfg: CfgNode) -> None:
    """Register the names in ``cfg.DATASETS`` and apply its ``SHAPES_SIZE``; repeatable.

    Args:
        cfg: its values are checked.
    """
    size = cfg.DATASETS.SHAPES_SIZE
    for name in _SYNTHETIC:
        if MetadataCatalog.get(name).get("size") != size:
            _register_shapes(name, size)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        register_dataset(name)


def register_dataset(name: str) -> None:
    """Register a ``coco:``, ``labels:`` or ``youtubevis:`` name, or have a registered set checked.

    Raises:
        DatasetError: the name is incomplete.
    """
    if name.startswith(COCO_PREFIX):
        _register_coco(name, *parse_coco_name(name))
    elif name.startswith(labels.PREFIX):
        _register_labels(name, labels.parse_name(name))
    elif name.startswith(youtube_vis.PREFIX):
        _register_youtube_vis(name, *parse_coco_name(name))
    elif name in DatasetCatalog:
        adopt(name)


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Give a set in COCO's format a name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Raises:
        DatasetError: the name is taken.
    """
    if name in DatasetCatalog:
        raise DatasetError(
            f"a data set is called {name!r} already; choose another name, or write "
            f"{COCO_PREFIX}{json_file}:{image_root}, which needs none"
        )
    _register_coco(name, json_file, image_root)


def parse_coco_name(name: str) -> tuple[str, str]:
    """``coco:PATH.json[:IMAGE_ROOT]``, or ``youtubevis:...`` → (JSON file, folder of the images).

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


class Classes(Protocol):
    """Anything with the name and classes of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...


def class_difference(first: Classes, second: Classes) -> str | None:
    """The first difference between the classes of two data sets; None if there is none."""
    for number, (one, other) in enumerate(zip_longest(first.classes, second.classes), start=1):
        if one != other:
            return (
                f"the data sets {first.name} and {second.name} differ in their classes or in the "
                f"order of them: number {number} is {one!r} in the one, {other!r} in the other"
            )
    return None


def training_records(datasets: Sequence[DataSet], *, filter_empty: bool) -> list[Record]:
    """The training records of several data sets with the same classes, in the order of the sets.

    Args:
        filter_empty: leave out images without instances and images with crowds only.
    Raises:
        DatasetError: no record is left.
    """
    names = ", ".join(dataset.name for dataset in datasets)
    records = list(chain.from_iterable(dataset.records for dataset in datasets))
    annotated = bool(records) and "annotations" in records[0]
    used_records: list[Record] = records
    if filter_empty and annotated:
        used_records = filter_images_with_only_crowd_annotations(records)
    if not used_records:
        with_any = sum(bool(record.get("annotations")) for record in records)
        raise DatasetError(f"data set {names}: {nothing_to_train_on(with_any, len(records))}")
    if annotated and datasets[0].classes:
        print_instances_class_histogram(used_records, list(datasets[0].classes))
    return used_records


def nothing_to_train_on(annotated: int, total: int) -> str:
    """Message that a data set has no instance to learn from, with what to do.

    Args:
        annotated: images with annotations.
        total: images.
    """
    crowds = ", but with crowds alone (iscrowd 1), which are not trained on" if annotated else ""
    return (
        f"{annotated} of {total} images are annotated{crowds}; to train on images without "
        "instances set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
    )


def check_records(cfg: CfgNode, name: str, records: Sequence[Record]) -> None:
    """Check that ``cfg`` can train on the records of the data set ``name``.

    Lists the folders of the images and opens no image.

    Raises:
        DatasetError: instances have no mask, or more images than ``DATALOADER.MAX_UNREADABLE`` have
            no file.
        ConfigError: ``INPUT.MASK_FORMAT`` does not suit the masks.
    """
    if cfg.MODEL.MASK_ON:
        check_masks(name, records)
        if cfg.INPUT.MASK_FORMAT == "polygon" and not cfg.INPUT.SAMPLES:
            _check_polygons(name, records)
    check_files(name, records, cfg.DATALOADER.MAX_UNREADABLE)


def check_files(name: str, records: Sequence[Record], allowed: int = 0) -> None:
    """Refuse records if more than ``allowed`` of their files, images and flows, cannot be read.

    Raises:
        DatasetError: with the first of these files.
    """
    files = {record["file_name"] for record in records}
    for record in records:
        files.update(record.get("reference_files", ()), record.get("flow_files", ()))
    unusable = list(unusable_files(sorted(files)))
    if len(unusable) > allowed:
        first = ", ".join(f"{file} ({reason})" for file, reason in unusable[:3])
        raise DatasetError(
            f"data set {name}: {len(unusable)} of {len(files)} images have no file that can be "
            f"read, first {first}"
        )


def check_masks(name: str, records: Sequence[Record]) -> None:
    """Refuse training records with an instance that has no mask.

    Detectron2 accepts them and fails much later, inside the mask loss of some batch.

    Raises:
        DatasetError: with the first images and annotations concerned.
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
            f"data set {name}: {len(bad)} of {len(records)} images have instances without a "
            f"segmentation, first {first}; instance segmentation needs a polygon or RLE for each "
            "instance"
        )


def _check_polygons(name: str, records: Sequence[Record]) -> None:
    for record in records:
        for annotation in record.get("annotations", ()):
            if isinstance(annotation["segmentation"], dict) and not annotation.get("iscrowd", 0):
                raise ConfigError(
                    f"data set {name}: annotation {annotation.get('id', 'without id')} of "
                    f"{record['file_name']} is an RLE, INPUT.MASK_FORMAT is polygon; set "
                    "INPUT.MASK_FORMAT bitmask"
                )


def _register(name: str, source: Source, **metadata: Any) -> None:
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, source)
        MetadataCatalog.get(name).set(**metadata)


def _register_shapes(name: str, size: int) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    classes = shapes.class_names(name)
    _register(
        name,
        Source(name, lambda: _synthetic(name, size), (name, size)),
        thing_classes=classes,
        # The ids that `instseg shapes export` writes.
        thing_dataset_id_to_contiguous_id={number + 1: number for number in range(len(classes))},
        evaluator_type="coco",
        size=size,
    )


@functools.lru_cache(maxsize=4)
def _synthetic(name: str, size: int) -> Content:
    """Content of a synthetic set.

    Unlike those of files, some stay in memory when nobody uses them: the largest takes 3 MB and
    seconds to make.
    """
    if name in shapes_video.SPLITS:
        return Content(shapes_video.load(name, size))
    split, indices = shapes.SUBSETS.get(name, (name, None))
    return Content(shapes.load(split, size, indices))


def _register_coco(name: str, json_file: str, image_root: str) -> None:
    source = coco_source(name, json_file, image_root)
    _register(name, source, json_file=json_file, image_root=image_root, evaluator_type="coco")


def _register_labels(name: str, parts: labels.LabelSet) -> None:
    source = Source(
        name,
        lambda: labels.load(name, parts),
        (labels.PREFIX, *parts),
        parts.files,
        lambda: labels.examine(name, parts),
    )
    _register(name, source, image_root=parts.images, evaluator_type="coco")


def _register_youtube_vis(name: str, json_file: str, image_root: str) -> None:
    source = Source(
        name,
        lambda: Content(youtube_vis.load(name, json_file, image_root)),
        (youtube_vis.PREFIX, image_root),
        (json_file,),
    )
    _register(name, source, image_root=image_root, evaluator_type=youtube_vis.EVALUATOR_TYPE)


def _register_voc(
    name: str,
    load: Callable[[str, str, str], list[Record]],
    folder: str,
    split: str,
    listing: str,
) -> None:
    file = os.path.join(folder, listing)
    _register(
        name,
        Source(name, lambda: Content(load(name, folder, split)), (name,), (file,)),
        thing_classes=list(voc.CLASSES),
        # The files count classes from 1.
        thing_dataset_id_to_contiguous_id={n + 1: n for n in range(len(voc.CLASSES))},
        evaluator_type=voc.EVALUATOR_TYPE,
    )


def _register_cvppp(name: str, folder: str, split: str) -> None:
    _register(
        name,
        Source(name, lambda: Content(cvppp.load(name, folder, split)), (name,), (folder,)),
        thing_classes=["leaf"],
        thing_dataset_id_to_contiguous_id={1: 0},
        evaluator_type=cvppp.EVALUATOR_TYPE,
    )


def _register_chairs(name: str, folder: str, split: str) -> None:
    listing = os.path.join(folder, flying_chairs.SPLIT_FILE)
    _register(
        name,
        Source(
            name,
            lambda: Content(flying_chairs.load(name, folder, split)),
            (name,),
            (listing,),
        ),
    )
