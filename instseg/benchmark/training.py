"""``instseg benchmark train``: iterations of a training against Detectron2's stock trainer."""

import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from instseg.benchmark.rows import Row
from instseg.config.nodes import load_cfg
from instseg.errors import ConfigError
from instseg.modeling import now
from instseg.projects import projects
from instseg.training.trainer import Trainer

_STOCK = "detectron2 DefaultTrainer"
_WARM_UP = 3
"""Steps of each turn that do not count; they use up what loaders prepared in the other's turn."""


def benchmark_train(
    config_files: Sequence[str] = (), overrides: Sequence[Any] = (), iterations: int = 20
) -> list[Row]:
    """Compare the steps of our trainer with those of Detectron2's ``DefaultTrainer``.

    Both train the same network on the same images, by turns in this process.  The stock trainer
    knows SGD alone, on a CPU float32 alone, and none of the keys of instseg.  A system that it
    cannot train gets a row without a peer.  Wall time is the median of the steps; CPU time and the
    wait for data are means, CPU time with that of the loaders' processes.

    Args:
        config_files: one row for each; without any, the example of each project.
        overrides: ``[KEY, VALUE, ...]``.
        iterations: timed steps of each trainer.
    Raises:
        ConfigError: fewer than one iteration, or a configuration that cannot be trained.
    """
    if iterations < 1:
        raise ConfigError(f"--iterations is {iterations}; expected at least 1")
    names = config_files or [project.example for project in projects()]
    return [_compare(name, load_cfg(name, overrides), iterations) for name in names]


def _compare(name: str, cfg: CfgNode, iterations: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        ours = _Steps(_seeded(Trainer, cfg))
        stock = None
        if _is_stock(cfg):  # after our trainer, which registers the data sets
            cfg.SOLVER.AMP.ENABLED &= cfg.MODEL.DEVICE != "cpu"
            stock = _Steps(_seeded(DefaultTrainer, cfg))
        half = -(-iterations // 2)
        for steps in (ours, stock, stock, ours):  # whoever comes second finds warmer caches
            if steps is not None:
                steps.run(half)
        for steps in (ours, stock):
            if steps is not None:
                steps.stop()
    row = Row(
        name=Path(name).stem,
        peer="-",
        ours_ms=ours.wall_ms,
        peer_ms=None,
        ratio_time=None,
        ratio_memory=None,
        cpu_ms=ours.cpu_ms,
        data_ms=ours.data_ms,
    )
    if stock is None:
        return row
    return replace(
        row,
        peer=_STOCK,
        peer_ms=stock.wall_ms,
        ratio_time=stock.wall_ms / row.ours_ms,
        peer_cpu_ms=stock.cpu_ms,
        ratio_cpu=stock.cpu_ms / row.cpu_ms if stock.cpu_ms and row.cpu_ms else None,
        peer_data_ms=stock.data_ms,
    )


def _is_stock(cfg: CfgNode) -> bool:
    """Whether Detectron2 has the model and the samples that it trains on."""
    kinds: list[Any] = [META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)]
    if kinds[0].__name__ == "GeneralizedRCNN":
        kinds.append(ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME))
    parts = all(kind.__module__.startswith("detectron2.") for kind in kinds)
    return parts and cfg.INPUT.AUGMENTATION == "detectron2" and not cfg.INPUT.SAMPLES


def _seeded(kind: type[DefaultTrainer], cfg: CfgNode) -> DefaultTrainer:
    """A trainer with the weights and the order of images that ``SEED`` gives."""
    seed_all_rng(max(cfg.SEED, 0))
    with _no_new_handlers():
        return kind(cfg)


@contextmanager
def _no_new_handlers() -> Iterator[None]:
    """Keep Detectron2's trainer from printing its log, network included, to stdout."""
    log = logging.getLogger("detectron2")
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)


class _Steps:
    """The steps of a trainer, without its hooks, and what they cost.

    Attributes:
        wall_ms: median of a step.
        cpu_ms: mean of a step, of this process and those that load its data; None where the system
            does not tell.
        data_ms: mean wait for data in a step.
    """

    def __init__(self, trainer: DefaultTrainer) -> None:
        self._loop: SimpleTrainer = trainer._trainer
        self._loop.iter = 0
        self._storage = EventStorage()
        self._workers: list[int] = []
        self._walls: list[float] = []
        self._waits: list[float] = []
        self._cpus: list[float] = []

    def run(self, count: int) -> None:
        """A turn of ``count`` timed steps."""
        others = {process.pid for process in multiprocessing.active_children()}
        for _ in range(_WARM_UP):
            self._step()
        if not self._walls:
            children = {process.pid for process in multiprocessing.active_children()}
            self._workers = sorted(pid for pid in children - others if pid is not None)
        before = _cpu_seconds(self._workers)
        for _ in range(count):
            start = now()
            self._step()
            self._walls.append(now() - start)
            self._waits.append(self._storage.history("data_time").latest())
        after = _cpu_seconds(self._workers)
        if before is not None and after is not None:
            self._cpus.append((after - before) / count)

    def stop(self) -> None:
        """End the processes that load data."""
        self._loop._data_loader_iter_obj = None

    @property
    def wall_ms(self) -> float:
        return 1000 * statistics.median(self._walls)

    @property
    def cpu_ms(self) -> float | None:
        return 1000 * statistics.fmean(self._cpus) if self._cpus else None

    @property
    def data_ms(self) -> float:
        return 1000 * statistics.fmean(self._waits)

    def _step(self) -> None:
        with self._storage:
            self._loop.run_step()
        self._loop.iter += 1


def _cpu_seconds(workers: Sequence[int]) -> float | None:
    """CPU time of this process and of ``workers``; None if the system does not tell."""
    seconds = time.process_time()
    try:
        for pid in workers:
            _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
            seconds += sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):  # not on Linux
        return None
    return seconds
