"""The classes of the model that a configuration describes: their number and names."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode

from instseg.categories import OBJECT, Categories, ClassCount
from instseg.data.build import class_difference
from instseg.data.categories import known_categories
from instseg.data.dataset import DataSet
from instseg.data.readers.json_files import read_json
from instseg.errors import ConfigError, DatasetError, short
from instseg.modeling.contract import declared_num_classes_key

logger = logging.getLogger(__name__)


def check_classes(cfg: CfgNode, datasets: Iterable[DataSet]) -> None:
    """Check data sets against the class count of ``cfg`` and against each other.

    Raises:
        ConfigError: with both numbers and the key to change.
    """
    model = class_count(cfg)
    first: DataSet | None = None
    for dataset in datasets:
        if not dataset.classes:
            continue
        # A model without classes may be tested on other classes than it was trained on.
        difference = class_difference(first, dataset) if model and first else None
        if difference is not None:
            raise ConfigError(f"{difference}; one model cannot serve both")
        first = first or dataset
        count = len(dataset.classes)
        if model is not None and model.count != count:
            raise ConfigError(
                f"data set {dataset.name} has {count} classes, {model.key} is {model.count}; set "
                f"{model.key} {count}"
            )


def num_classes_key(cfg: CfgNode) -> str | None:
    """The key that holds the number of classes of ``cfg``'s model; None for class-agnostic ones.

    Raises:
        ConfigError: the architecture does not declare it.
    """
    return declared_num_classes_key(cfg.MODEL.META_ARCHITECTURE)


def class_count(cfg: CfgNode) -> ClassCount | None:
    """Number of classes of ``cfg``'s model; None for class-agnostic ones."""
    key = num_classes_key(cfg)
    return ClassCount(key, functools.reduce(getattr, key.split("."), cfg)) if key else None


def model_categories(
    cfg: CfgNode, checkpoint: Mapping[str, Any], chosen: Categories | None = None
) -> Categories:
    """The ids and names of the classes of a model.

    The first of these sources that names any counts: the user, the checkpoint,
    ``MODEL.CATEGORIES``, which training writes into its ``config.yaml``, and the data set
    ``DATASETS.TEST[0]``.  A source with another number of classes than the model never counts.

    Args:
        cfg: of the model.
        checkpoint: its entries beside the weights.
        chosen: the user's choice.
    Returns:
        as many classes as the model has; ``object`` for a class-agnostic model.  Missing names are
        logged.
    Raises:
        ConfigError: ``chosen`` does not fit the model.
    """
    model = class_count(cfg)
    if chosen is not None:
        _check_chosen(chosen, model)
        return chosen
    if model is None:
        return OBJECT
    for source, categories in _sources(cfg, checkpoint):
        if len(categories) == model.count:
            return categories
        if source:
            logger.warning(
                "%s names %d classes, the model has %d: they are not used",
                source,
                len(categories),
                model.count,
            )
    logger.warning(
        "nothing names the %d classes of this model: results say class 0, class 1, ... and have "
        "these numbers for category_id; name them with --classes",
        model.count,
    )
    return Categories.unnamed(model.count)


def _sources(cfg: CfgNode, checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Categories]]:
    """Sources of classes with their names, the most reliable first; "" is the data set."""
    names = cfg.DATASETS.TEST
    test = known_categories(names[0]) if names and "categories" not in checkpoint else None
    try:
        saved = Categories.of_checkpoint(checkpoint)
    except ValueError as error:
        logger.warning("%s; they are not used", error)
        saved = test = None
    if saved is not None and test is not None and test.names == saved.names:
        yield "", test  # older weights have no ids
    if saved is not None:
        yield "the checkpoint", saved
    if (configured := configured_categories(cfg)) is not None:
        yield "MODEL.CATEGORIES", configured
    if saved is None and test is not None:
        yield "", test


def configured_categories(cfg: CfgNode) -> Categories | None:
    """``MODEL.CATEGORIES``; None if it is empty, or missing as in stock Detectron2.

    Raises:
        ConfigError: it is no list of categories.
    """
    entries = cfg.MODEL.get("CATEGORIES")
    if entries is None or entries == [] or entries == ():
        return None
    try:
        return Categories.of_coco(entries)
    except ValueError as error:
        raise ConfigError(f"MODEL.CATEGORIES: {error}") from None


def training_categories(cfg: CfgNode, dataset: DataSet) -> Categories | None:
    """The classes that a model learns from ``dataset``; None if the set names none."""
    return OBJECT if class_count(cfg) is None else dataset.categories


def with_categories(cfg: CfgNode, categories: Categories | None) -> CfgNode:
    """A frozen copy of ``cfg`` with ``categories`` in ``MODEL.CATEGORIES``."""
    copy = cfg.clone()
    copy.defrost()
    copy.MODEL.CATEGORIES = categories.as_coco() if categories and categories.named else []
    copy.freeze()
    return copy


def classes_option(text: str) -> Categories:
    """Parse ``--classes``: ``NAME,NAME,...`` in the order of the classes, or ``FILE.json``.

    The file is in COCO's format; its classes are ordered by id, as Detectron2 trains on them.

    Raises:
        ConfigError: a name is empty or repeated, or the file cannot be read or has no categories.
    """
    if text.lower().endswith(".json"):
        return _classes_of_file(text)
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(
            f"--classes {short(text)} has an empty name; expected NAME,NAME,... or FILE.json"
        )
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--classes has the name {short(repeated)} twice; expected one per class")
    return Categories.of_names(names)


def _classes_of_file(file: str) -> Categories:
    try:
        content = read_json(file, f"data set {file}")
        entries = content.get("categories") if isinstance(content, dict) else content
        return Categories.of_coco(entries, by_id=True)
    except DatasetError as error:
        raise ConfigError(f"--classes: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f"--classes {file}: categories: {error}; expected a file in COCO's format"
        ) from None


def _check_chosen(chosen: Categories, model: ClassCount | None) -> None:
    """Raise a ConfigError if ``--classes`` does not fit the classes of the model."""
    if model is None:
        raise ConfigError("--classes: this model knows no classes; leave --classes out")
    if len(chosen) != model.count:
        raise ConfigError(
            f"--classes names {len(chosen)} classes, the model has {model.count} ({model.key}); "
            "name each of them once, in the order of the classes"
        )
