"""The registration module: the list of projects, and the only place where instseg imports them."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode

#: Every paper, in the order of the README's table.
PROJECTS: tuple[str, ...] = (
    "mask_rcnn",
    "mask_scoring_rcnn",
    "instance_fcn",
    "fcis",
    "yolact",
    "yolact_plus",
    "yolact_edge",
    "discriminative_loss",
    "deepmask",
    "sharpmask",
    "sgn",
)


def add_project_configs(cfg: "CfgNode") -> None:
    """Import every project, which registers its classes, and add the keys it defines to ``cfg``."""
    for name in PROJECTS:
        project = import_module(f"instseg.projects.{name}")
        # Mask R-CNN is Detectron2's own and defines no key.
        add_config = getattr(project, f"add_{name}_config", None)
        if add_config is not None:
            add_config(cfg)


def converters() -> dict[str, str]:
    """Authors' formats of weights, in alphabetical order, and the modules that convert them.

    A project declares a format by a module: ``convert_<format>``, or ``convert`` for the format
    that has the name of the project.  No project is imported: a command's help names the formats.
    """
    found: dict[str, str] = {}
    for project in PROJECTS:
        spec = find_spec(f"{__name__}.{project}")
        folders = spec.submodule_search_locations if spec else None
        for module in pkgutil.iter_modules(folders or []):
            first, _, format_name = module.name.partition("_")
            if first == "convert":
                found[format_name or project] = f"{__name__}.{project}.{module.name}"
    return dict(sorted(found.items()))
