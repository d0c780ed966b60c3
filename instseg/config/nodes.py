"""Configuration: Detectron2's defaults, the keys of instseg and of all projects, loaded safely.

``get_cfg()`` returns a node that behaves like Detectron2's with three differences: YAML can never
execute code, a mistake is a :class:`~instseg.errors.ConfigError` that names the nearest key, and
the default of ``MODEL.DEVICE`` is a device of this machine.
"""

import difflib
import functools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode as Detectron2CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.registry import Registry

from instseg.config.files import load_yaml
from instseg.config.keys import add_shared_config, rename_keys, take_old_keys
from instseg.config.rules import check_values
from instseg.data.build import register_builtin_datasets, register_datasets
from instseg.data.samples import SAMPLES_REGISTRY
from instseg.errors import ConfigError
from instseg.projects import add_project_configs
from instseg.shipped import of_address

logger = logging.getLogger(__name__)

_LONGEST = 200
"""Characters of a value in a message."""
_TYPE_MISMATCH = re.compile(
    r"Type mismatch \(<class '(.+?)'> vs\. <class '(.+?)'>\) "
    r"with values \((.*) vs\. (.*)\) for config key: (.+)"
)


class CfgNode(Detectron2CfgNode):
    """Detectron2's node with safe loading and errors that name the nearest key."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Read ``filename`` and the files it names under ``_BASE_`` into one dict.

        Args:
            filename: a YAML file; ``_BASE_`` paths are relative to it.
            allow_unsafe: must be False; Detectron2's switch for YAML tags that run code.
        Raises:
            ConfigError: missing, empty or malformed file, YAML that asks to execute code, cyclic
                ``_BASE_``.
        """
        if allow_unsafe:
            raise ConfigError(
                f"{filename}: allow_unsafe=True would execute code from a YAML file; write plain "
                "values instead"
            )
        return load_yaml(filename)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file, given by path or by its name inside the installed ``configs/``."""
        path = find_config(cfg_filename)
        try:
            super().merge_from_file(path, allow_unsafe=allow_unsafe)
        except ConfigError as error:
            prefix = "" if str(error).startswith(path) else f"{path}: "
            raise ConfigError(f"{prefix}{error}") from None
        except (RecursionError, MemoryError):
            raise ConfigError(
                f"{path}: values are nested too deeply or contain themselves"
            ) from None
        except (AssertionError, AttributeError, TypeError, LookupError) as error:
            # Detectron2 looks into groups such as MODEL before their types are checked.
            raise ConfigError(f"{path}: a group of keys has a wrong type: {error}") from None

    def merge_from_other_cfg(self, cfg_other: Detectron2CfgNode) -> None:
        """Merge ``cfg_other``; every key must exist here with a value of the same type."""
        take_old_keys(cfg_other)
        for key, value in _leaves(cfg_other):
            _check_key(self, key, value, is_node=isinstance(value, dict))
        try:
            super().merge_from_other_cfg(cfg_other)
        except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(_explain(error)) from None

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` as given at the end of a command line."""
        options = [word for word in map(str, cfg_list) if word.startswith("--")]
        if options:
            raise ConfigError(f"{options[0]} is an option; put options before the KEY VALUE pairs")
        if len(cfg_list) % 2:
            raise ConfigError(
                f"overrides must be pairs KEY VALUE, found {len(cfg_list)} words: "
                f"{' '.join(map(str, cfg_list))}"
            )
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            _check_key(self, str(key), value)
        try:
            super().merge_from_list(list(cfg_list))
        except (RecursionError, MemoryError):  # of Python's parser, which reads every value
            raise ConfigError("a value among the overrides is nested too deeply") from None
        except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(_explain(error)) from None


def get_cfg() -> CfgNode:
    """Detectron2's defaults + the keys of instseg and of every project.

    ``MODEL.DEVICE`` is ``cuda`` where there is a GPU and ``cpu`` elsewhere; the choice is logged
    once.
    """
    register_builtin_datasets()
    cfg = get_detectron2_cfg()
    add_shared_config(cfg)
    add_project_configs(cfg)
    cfg.MODEL.DEVICE = _default_device()
    # Wrapped last, so that the nodes of the projects are of this class too.
    cfg = CfgNode(cfg)
    rename_keys(cfg)
    return cfg


def load_cfg(path: str | os.PathLike[str], overrides: Sequence[Any] = ()) -> CfgNode:
    """``get_cfg()`` + one YAML file + ``[KEY, VALUE, ...]``, with its data sets registered.

    Args:
        path: a file, or its name inside the installed ``configs/``, e.g.
            ``mask_rcnn/mask_rcnn_shapes.yaml``; or ``zoo://NAME``, the configuration of a shipped
            model with its weights.
        overrides: as at the end of ``train_net.py``'s command line.
    Raises:
        ConfigError: see :class:`CfgNode`; an unknown name of a part, or a value that cannot be used
            (see :func:`check_names`, :func:`~instseg.config.rules.check_values`).
        CheckpointError: no such model is shipped.
    """
    cfg = get_cfg()
    cfg.merge_from_file(os.fspath(path))
    if (shipped := of_address(os.fspath(path))) is not None:
        cfg.merge_from_list(shipped.settings)
    cfg.merge_from_list(overrides)
    check_names(cfg)
    check_values(cfg)
    register_datasets(cfg)
    return cfg


def find_config(name: str) -> str:
    """Path of a configuration file.

    Args:
        name: its path, its name inside the installed ``configs/``, or ``zoo://NAME``.
    """
    if (shipped := of_address(name)) is not None:
        name = shipped.config
    elif os.path.isdir(name):
        raise ConfigError(f"config file {name} is a folder; give one of the YAML files in it")
    elif os.path.isfile(name):
        return name
    installed = Path(__file__).parents[1] / "configs"
    if not installed.is_dir():  # an editable installation keeps configs/ beside the package
        installed = Path(__file__).parents[2] / "configs"
    relative = name.removeprefix("configs/")
    if os.path.isfile(installed / relative):  # Path.is_file() raises for a name that is too long
        return str(installed / relative)
    known = [str(path.relative_to(installed)) for path in installed.rglob("*.yaml")]
    raise ConfigError(f"config file {name} does not exist{_did_you_mean(relative, known)}")


def check_names(cfg: CfgNode) -> None:
    """Check that every part of the model named in ``cfg`` is registered.

    Raises:
        ConfigError: an unknown name, with close ones and where they are defined.
    """
    from detectron2.modeling import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        PROPOSAL_GENERATOR_REGISTRY,
        ROI_HEADS_REGISTRY,
        ROI_KEYPOINT_HEAD_REGISTRY,
        ROI_MASK_HEAD_REGISTRY,
        SEM_SEG_HEADS_REGISTRY,
    )
    from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
    from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY

    registries: dict[str, Registry] = {
        "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
        "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
        "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
        "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
        "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
        "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
        "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
        "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
        "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
        "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
        "INPUT.SAMPLES": SAMPLES_REGISTRY,
    }
    for key, registry in registries.items():
        name = functools.reduce(getattr, key.split("."), cfg)
        if name in ("", "PrecomputedProposals") or name in registry:
            continue
        defined = {known: module.__module__ for known, module in registry}
        close = difflib.get_close_matches(name, defined, n=3, cutoff=0.4) or sorted(defined)
        listing = ", ".join(f"{known} ({defined[known]})" for known in close)
        raise ConfigError(f"{key}: nothing is registered as {name!r}; did you mean {listing}?")


def check_device(cfg: CfgNode) -> None:
    """Raise a ConfigError if ``MODEL.DEVICE`` is a GPU that this machine does not have."""
    device = cfg.MODEL.DEVICE
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {device}, but this machine has no usable GPU; set MODEL.DEVICE cpu"
        )
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {device}; this machine has the GPUs cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}"
        )


@functools.cache
def _default_device() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logger.info(f"MODEL.DEVICE defaults to {device}")
    return device


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_key(cfg: CfgNode, key: str, value: Any, is_node: bool = False) -> None:
    node: Any = cfg
    if cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
        return  # yacs explains these itself
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            known = [name for name, _ in _leaves(cfg)]
            raise ConfigError(f"unknown key {key}{_did_you_mean(key, known)}")
        node = node[part]
    if isinstance(node, dict) and not is_node:
        inside = ", ".join(f"{key}.{name}" for name in list(node)[:3])
        raise ConfigError(
            f"{key} is a group of keys, not a value; set one of its keys, e.g. {inside}"
        )
    # yacs accepts None as a value of any type.
    if node is not None and (value is None or str(value).strip() == "None"):
        raise ConfigError(
            f"{key} must be of type {type(node).__name__} (like {node}), found no value"
        )


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    """Hint with the nearest of ``known``: first by the whole name, then by its last part."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.75)
    if not close:
        last = {candidate.rsplit(".", 1)[-1].lower(): candidate for candidate in known}
        close = difflib.get_close_matches(name.rsplit(".", 1)[-1].lower(), last, n=1, cutoff=0.75)
        return f"; did you mean {last[close[0]]}?" if close else ""
    return f"; did you mean {lowered[close[0]]}?"


def _explain(error: Exception) -> str:
    """An error message of yacs about a value, on one line."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    mismatch = _TYPE_MISMATCH.fullmatch(text)
    if mismatch is None:
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    expected, actual, current, value, key = mismatch.groups()
    value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    example = f"; write \"('{value}',)\"" if (expected, actual) == ("tuple", "str") else ""
    return f"{key} must be of type {expected} (like {current}), found {actual} {value}{example}"
