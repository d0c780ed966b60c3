"""Arguments that several commands share."""

import argparse
from pathlib import Path
from typing import Any

from instseg.shipped import SCHEME


def path(text: str) -> Path:
    """A path; refuses an empty one (an unset shell variable), which Python would take as ``.``."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that runs one model to ``parser``."""
    add = parser.add_argument
    add_config_arguments(parser)
    add("--weights", metavar="FILE", help="checkpoint, instead of MODEL.WEIGHTS")
    add_allow_partial(parser)
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration overrides, last")


def add_config_arguments(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add ``--config-file`` and ``--model``, one of which is required, to ``parser``.

    Both give ``config_file``: the configuration of a shipped model is ``zoo://NAME``.

    Args:
        options: for both, such as ``action="append"``.
    """
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--config-file", metavar="FILE", help="YAML file, or its name in configs/", **options)
    add(
        "--model",
        dest="config_file",
        type=_address,
        metavar="NAME",
        help="a shipped model, with its configuration and weights; `instseg models` lists them",
        **options,
    )


def _address(name: str) -> str:
    return f"{SCHEME}{name}"


def add_allow_partial(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that loads weights for inference to ``parser``."""
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="go on with weights that do not fit the model; missing tensors stay random",
    )


def add_classes_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``--classes``, the names of a model's classes, to ``parser``."""
    parser.add_argument(
        "--classes",
        metavar="CLASSES",
        help="names of the classes in their order, NAME,NAME,..., or FILE.json in COCO's format, "
        "with the ids for results",
    )


def add_format_argument(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Give ``parser`` the argument for formats of results, called ``name``."""
    default = " (default %(default)s)" if "default" in options else ""
    parser.add_argument(
        name,
        metavar="FORMAT,...",
        help="coco: predictions.json; labels: STEM_labels.tif, a number per instance; csv: "
        "measurements.csv, a row per instance; geojson: STEM.geojson for QuPath; imagej: "
        f"STEM_rois.zip; yolo: STEM.txt; one or more{default}",
        **options,
    )
