"""The registration module: the list of projects, and the only place where instseg imports them."""

from importlib import import_module

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


def add_project_configs(cfg: CfgNode) -> None:
    """Import every project, which registers its classes, and add the keys it defines to ``cfg``."""
    for name in PROJECTS:
        project = import_module(f"instseg.projects.{name}")
        # Mask R-CNN is Detectron2's own and defines no key.
        add_config = getattr(project, f"add_{name}_config", None)
        if add_config is not None:
            add_config(cfg)
