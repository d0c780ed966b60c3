"""Weights released by the authors of a paper, made into checkpoints for our models.

Each authors' format has a module in the project of the paper, with a function ``convert``, a
:class:`Converter`.  This package holds what the converters share; the readers of file formats are
in :mod:`instseg.checkpoint`.  Reading executes nothing that a file contains.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from instseg.categories import Categories
from instseg.checkpoint.writing import save_safetensors
from instseg.config.classes import model_categories
from instseg.convert.common import Converter, Report, class_tensors
from instseg.convert.configuration import Options, config_text
from instseg.errors import ConfigError
from instseg.files import atomic_write
from instseg.projects import converters

__all__ = ["Converter", "Options", "Report", "convert_file"]


def convert_file(
    format_name: str, source: str, target: str | os.PathLike[str], options: Options | None = None
) -> tuple[Path, Report]:
    """Convert the file ``source``; write the result and, as ``.yaml`` beside it, its configuration.

    Args:
        format_name: a key of :func:`instseg.projects.converters`.
        source: path or URL of the authors' file.
        target: file to write: ``.safetensors``, which is appended if there is no extension, or
            ``.pth``.
        options: None for the defaults.
    Returns:
        the file of weights, and what became of every tensor.
    Raises:
        ConfigError: unknown format, a target that cannot be chosen, or options that the file
            contradicts.
        CheckpointError: see :class:`Converter`.
        OutputError: the target cannot be written.
    """
    modules = converters()
    if format_name not in modules:
        raise ConfigError(
            f"there is no converter for {format_name!r}; choose one of {', '.join(modules)}"
        )
    path = Path(target)
    path = path if path.suffix else path.with_name(f"{path.name}.safetensors")
    if path.suffix not in (".safetensors", ".pth"):
        raise ConfigError(f"{path}: the name of the result must end in .safetensors or .pth")
    if os.path.exists(path) and os.path.exists(source) and path.samefile(source):
        raise ConfigError(f"{path} is the file to convert; give the result another name")
    options = options or Options()
    config = path.with_suffix(".yaml")
    chosen = options.config
    if chosen and os.path.exists(config) and os.path.exists(chosen) and config.samefile(chosen):
        raise ConfigError(f"{config} is the --config-file; give the result another name")
    convert: Converter = import_module(modules[format_name]).convert
    state, report = convert(source, options)
    origin: dict[str, Any] = {"converted_from": format_name}
    if (categories := _categories(path, report, options)) is not None:
        origin["categories"] = categories.as_coco()
    if path.suffix == ".pth":
        # Cloned, since slices would take the whole tensors they belong to into the file.
        content = {**origin, "model": {name: value.clone() for name, value in state.items()}}
        atomic_write(path, lambda file: torch.save(content, file))
    else:
        save_safetensors(path, state, origin)
    text = config_text(report.choice, path, source)
    atomic_write(config, lambda file: file.write(text))
    return path, report


def _categories(path: Path, report: Report, options: Options) -> Categories | None:
    """The classes that the result names: the user's, or those of the data set it is for.

    None if nothing names them, or if the result has no layer for classes.

    Raises:
        ConfigError: the user's classes do not fit the file.
    """
    if not class_tensors(report.choice.cfg) & report.mapped.keys():
        if options.classes is not None:
            raise ConfigError(f"--classes: {path} gets no layer for classes; leave --classes out")
        return None
    categories = model_categories(report.choice.cfg, {}, options.classes)
    return categories if categories.named else None
