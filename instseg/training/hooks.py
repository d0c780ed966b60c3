"""Optional parts of training, each switched on by one configuration key."""

import difflib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from instseg.checkpoint import Checkpointer, read_weights
from instseg.data.dataset import DataSet
from instseg.errors import CheckpointError, ConfigError, short
from instseg.evaluation import lower_is_better, metric_names

logger = logging.getLogger(__name__)

_TOTAL = "val/total_loss"


class BestCheckpoint(BestCheckpointer):
    """Keeps the weights with the best ``metric`` in ``FOLDER/model_best.pth``.

    Unlike Detectron2's, it compares after every step, since losses and evaluations have different
    periods, and saves the best value, so that a resumed training goes on from it.

    The folder is not the one that training resumes from, so the best checkpoint never passes for
    the last one.  Must run after the evaluation.
    """

    def __init__(
        self, checkpointer: Checkpointer, metric: str, *, lower_is_better: bool = False
    ) -> None:
        """
        Args:
            checkpointer: saves the weights into a separate folder.
            metric: name in the event storage, e.g. ``segm/AP``; a value must be finite to count.
            lower_is_better: keep the lowest value, for losses.
        """
        super().__init__(0, checkpointer, metric, "min" if lower_is_better else "max")
        self._measured = -1  # the iteration of the latest value

    def before_train(self) -> None:
        path = Path(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter > 0 and path.is_file():
            try:
                self.best_metric = read_weights(str(path))["best_value"]
            except (CheckpointError, KeyError) as error:
                # Raised on the main process alone, it would leave the others waiting.
                logger.warning(f"{path} does not count as the best so far: {error}")

    def after_step(self) -> None:
        self._best_checking()

    def after_train(self) -> None:
        self._best_checking()
        interrupted = self.trainer.iter < self.trainer.max_iter
        if self._measured < 0 and not interrupted:
            known = ", ".join(sorted(name for name in self.trainer.storage.latest() if "/" in name))
            logger.error(
                f"TEST.BEST_METRIC {self._val_metric} was never measured, so no best checkpoint "
                f"was kept; measured were {known}"
            )

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, -1))
        if iteration == self._measured:
            return
        self._measured = iteration
        better = self.best_metric is None or self._compare(value, self.best_metric)
        if better and self._update_best(value, iteration):
            logger.info(f"best {self._val_metric} so far: {value:.4f} at iteration {iteration}")
            self._checkpointer.save(self._file_prefix, iteration=iteration, best_value=value)


class ValidationLoss(HookBase):
    """Writes the losses on validation data as ``val/<loss>`` every ``period`` iterations.

    The model computes them in training mode, except that normalisation layers use and keep their
    running statistics; the random numbers of training are left as they were.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        build_loader: Callable[[], Iterable[list[dict[str, Any]]]],
        used: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            period: iterations between two measurements.
            model: returns a dict of scalar losses in training mode.
            build_loader: gives the batches, with annotations, once per measurement.
            used: the model has the weights to measure inside of it.
        """
        self._period = period
        self._model = model
        self._build_loader = build_loader
        self._used = used

    def after_step(self) -> None:
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if (self.trainer.iter + 1) % self._period == 0 or last:
            self._measure()

    def names(self) -> list[str]:
        """Names of the losses, measured on one batch per process; every process has to call it."""
        losses, _ = self._sums(itertools.islice(self._build_loader(), 1))
        loss_names = set(itertools.chain.from_iterable(comm.all_gather(list(losses))))
        return [_TOTAL, *sorted(f"val/{name}" for name in loss_names)]

    def _measure(self) -> None:
        with self._used():
            gathered = comm.gather(self._sums(self._build_loader()))
        if not comm.is_main_process():
            return
        batches = sum(n for _, n in gathered)
        for name in {name for part, _ in gathered for name in part}:
            mean = sum(part.get(name, 0.0) for part, _ in gathered) / batches
            self.trainer.storage.put_scalar(f"val/{name}", mean, smoothing_hint=False)
        total = sum(sum(part.values()) for part, _ in gathered) / batches
        self.trainer.storage.put_scalar(_TOTAL, total, smoothing_hint=False)

    @torch.no_grad()
    def _sums(self, batches: Iterable[list[dict[str, Any]]]) -> tuple[dict[str, float], int]:
        """Sum of each loss over ``batches``, and the number of batches."""
        sums: dict[str, float] = {}
        count = 0
        norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        was_training = [norm.training for norm in norms]
        for norm in norms:
            norm.eval()
        # A separate storage, since models write statistics of sampling into the current one.
        device = next(self._model.parameters()).device
        numpy_state = np.random.get_state()
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            EventStorage(),
        ):
            torch.manual_seed(0)  # the same anchors and regions are sampled each time
            for batch in batches:
                for name, loss in self._model(batch).items():
                    sums[name] = sums.get(name, 0.0) + loss.item()
                count += 1
        np.random.set_state(numpy_state)
        for norm, training in zip(norms, was_training, strict=True):
            norm.train(training)
        return sums, count


def check_best_metric(
    cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet], losses: ValidationLoss | None
) -> bool:
    """Check before training that something will measure ``TEST.BEST_METRIC``.

    Returns:
        whether its lowest value is the best.
    Raises:
        ConfigError: nothing measures it; the message has close names.
    """
    metric = cfg.TEST.BEST_METRIC
    known = metric_names(cfg, model, datasets)
    if metric in known:
        if cfg.TEST.EVAL_PERIOD <= 0:
            raise ConfigError(
                f"TEST.BEST_METRIC {metric} needs evaluations during training; set "
                "TEST.EVAL_PERIOD to a number of iterations"
            )
        return lower_is_better(metric)
    if losses is not None:
        measured = losses.names()
        if metric in measured:
            return True
        known += measured
    elif metric.startswith("val/"):
        raise ConfigError(
            f"TEST.BEST_METRIC {metric} needs losses on DATASETS.TEST; set TEST.VAL_LOSS_PERIOD to "
            "a number of iterations"
        )
    raise ConfigError(
        f"TEST.BEST_METRIC is {metric}, which is not measured{_instead(metric, known)}"
    )


def check_expected_results(cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet]) -> None:
    """Check before training that ``TEST.EXPECTED_RESULTS`` can be compared with its results.

    Raises:
        ConfigError: an entry that is not ``[TASK, METRIC, VALUE, TOLERANCE]``, or that nothing
            measures; several data sets, whose results Detectron2 does not compare.
    """
    entries = cfg.TEST.EXPECTED_RESULTS
    if not len(entries):
        return
    if len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(
            f"TEST.EXPECTED_RESULTS is for one data set, DATASETS.TEST has "
            f"{len(cfg.DATASETS.TEST)}; set TEST.EXPECTED_RESULTS []"
        )
    known = metric_names(cfg, model, datasets)
    for entry in entries:
        if not _is_expected_result(entry):
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS has {short(entry)}; expected [TASK, METRIC, VALUE, "
                "TOLERANCE], such as ['segm', 'AP', 38.5, 0.2]"
            )
        metric = "/".join(entry[:2])
        if metric not in known:
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS has {metric}, which is not measured"
                f"{_instead(metric, known)}"
            )


def _is_expected_result(entry: Any) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        return False
    names, numbers = entry[:2], entry[2:]
    return all(isinstance(name, str) for name in names) and all(
        isinstance(number, int | float) for number in numbers
    )


def _instead(metric: str, known: list[str]) -> str:
    """The end of an error message: the names in ``known`` that may be meant."""
    if not known:
        return ": DATASETS.TEST is empty"
    # With several data sets, the name of one stands before the metric.
    pairs = [(name, f"/{name}".lower(), f"/{metric}".lower()) for name in known]
    close = [name for name, one, other in pairs if one.endswith(other) or other.endswith(one)]
    lowered = {name.lower(): name for name in known}
    for name in difflib.get_close_matches(metric.lower(), lowered, n=5, cutoff=0.6):
        close.append(lowered[name])
    if close:
        return f"; did you mean {', '.join(list(dict.fromkeys(close))[:5])}?"
    return f"; measured are {', '.join(name for name in known if '-' not in name)}"
