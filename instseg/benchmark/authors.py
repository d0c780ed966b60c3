"""The code of a paper's authors as a peer of ``instseg benchmark models``."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from yaml import safe_load

from instseg.benchmark.rows import Row, cpu_and_wall, in_fresh_process
from instseg.config.nodes import CfgNode as SafeCfgNode
from instseg.config.nodes import get_cfg
from instseg.errors import ConfigError
from instseg.projects import Project, projects

Milliseconds = tuple[float, float]
"""Of the processor and of the clock, for each image."""


def authors_of(option: str) -> tuple[Project, Path]:
    """A project and the folder with its authors' code, from ``NAME=FOLDER``.

    Raises:
        ConfigError: there is no such folder, or no project of that name that can run it.
    """
    name, _, folder = option.partition("=")
    known = {project.name: project for project in projects() if project.authors is not None}
    if name not in known or not folder or not Path(folder).is_dir():
        raise ConfigError(
            f"--authors is {option}; expected NAME=FOLDER, a folder with the authors' code of "
            f"{' or '.join(known)}"
        )
    return known[name], Path(folder).resolve()


def check_authors(option: str, cfg: CfgNode) -> None:
    """
    Args:
        option: see :func:`authors_of`.
        cfg: of the network that the authors' code is compared with.
    Raises:
        ConfigError: see :func:`authors_of`; the authors have no such network; it has weights or
            runs on a GPU, while theirs is random and runs on the CPU.
    """
    project, folder = authors_of(option)
    if cfg.MODEL.DEVICE != "cpu":
        raise ConfigError(
            "--authors runs the authors' code on the CPU and MODEL.DEVICE is "
            f"{cfg.MODEL.DEVICE}; set MODEL.DEVICE cpu"
        )
    if cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "--authors runs the authors' network with random weights and MODEL.WEIGHTS is "
            f"{cfg.MODEL.WEIGHTS}; set MODEL.WEIGHTS ''"
        )
    assert project.authors is not None
    project.authors(cfg, folder)


def authors_milliseconds(
    option: str, cfg: CfgNode, images: Sequence[np.ndarray], repeats: int
) -> Milliseconds:
    """Median times of the authors' code for an image, one image after the other.

    It runs in a process of its own with as many threads as this one.

    Args:
        option: see :func:`authors_of`.
        cfg: of the network that it is compared with; :func:`check_authors` accepts it.
    Raises:
        ConfigError: the code ends with an error.
    """
    threads = torch.get_num_threads()
    measured = in_fresh_process(_measure, option, cfg.dump(), images, repeats, threads)
    if measured is None:
        raise ConfigError(f"--authors {option}: its code ends with an error, which is above")
    return measured


def _measure(
    option: str, config: str, images: Sequence[np.ndarray], repeats: int, threads: int
) -> Milliseconds:
    torch.set_num_threads(threads)
    project, folder = authors_of(option)
    cfg = get_cfg()
    cfg.merge_from_other_cfg(SafeCfgNode(safe_load(config)))
    assert project.authors is not None
    predict = project.authors(cfg, folder)()

    def run() -> None:
        for image in images:
            predict(image)

    run()
    times = [cpu_and_wall(run) for _ in range(repeats)]
    cpu, wall = (1000 * statistics.median(x) / len(images) for x in zip(*times, strict=True))
    return cpu, wall


def against_authors(row: Row, milliseconds: Milliseconds) -> Row:
    """``row`` with the authors' code in place of its peer."""
    cpu, wall = milliseconds
    return replace(
        row,
        peer="the authors' code",
        peer_ms=wall,
        ratio_time=wall / row.ours_ms,
        ratio_memory=None,
        peer_cpu_ms=cpu,
        ratio_cpu=cpu / row.cpu_ms if row.cpu_ms else None,
        stages_ms={},
    )
