"""Optional parts of training, each switched on by one configuration key."""

import logging
import math
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from instseg.checkpoint import Checkpointer, read_weights
from instseg.errors import CheckpointError

logger = logging.getLogger(__name__)


class BestCheckpoint(HookBase):
    """Keeps the weights with the best ``metric`` in ``FOLDER/model_best.pth``.

    The folder is not the one that training resumes from, so the best checkpoint never passes for
    the last one.  Must run after the evaluation; a resumed training goes on with the value so far.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str) -> None:
        """
        Args:
            checkpointer: saves the weights, into a folder of its own.
            metric: name in the event storage, e.g. ``segm/AP``; NaN never is the best.  Of a name
                with "loss" in it, as ``val/total_loss``, the lowest value is the best.
        """
        self._checkpointer = checkpointer
        self._metric = metric
        self._lower_is_better = "loss" in metric
        self._best: float | None = None
        self._seen = -1

    def before_train(self) -> None:
        path = Path(self._checkpointer.save_dir, "model_best.pth")
        if self.trainer.start_iter > 0 and path.is_file():
            try:
                self._best = read_weights(str(path))["best_value"]
            except (CheckpointError, KeyError) as error:
                # Raised on the main process alone, it would leave the others waiting.
                logger.warning(f"{path} is not compared with: {error}")

    def after_step(self) -> None:
        self._check()

    def after_train(self) -> None:
        self._check()
        if self._seen < 0 and self.trainer.iter >= self.trainer.max_iter:  # not when interrupted
            known = ", ".join(sorted(name for name in self.trainer.storage.latest() if "/" in name))
            logger.error(
                f"TEST.BEST_METRIC {self._metric} was never measured, so no best checkpoint was "
                f"kept; there are {known}"
            )

    def _check(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        if iteration == self._seen:
            return
        self._seen = iteration
        if math.isnan(value):
            return
        better = operator.lt if self._lower_is_better else operator.gt
        if self._best is None or better(value, self._best):
            self._best = float(value)
            logger.info(f"best {self._metric} so far: {value:.4f} at iteration {iteration}")
            self._checkpointer.save("model_best", iteration=iteration, best_value=self._best)


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
    ) -> None:
        """
        Args:
            period: iterations between two measurements.
            model: returns a dict of scalar losses in training mode.
            build_loader: gives the batches, with annotations, once per measurement.
        """
        self._period = period
        self._model = model
        self._build_loader = build_loader

    def after_step(self) -> None:
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if (self.trainer.iter + 1) % self._period == 0 or last:
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        sums: dict[str, float] = {}
        count = 0
        norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        was_training = [norm.training for norm in norms]
        for norm in norms:
            norm.eval()
        # A storage of its own: models write statistics of sampling into the current one.
        device = next(self._model.parameters()).device
        numpy_state = np.random.get_state()
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            EventStorage(self.trainer.iter),
        ):
            torch.manual_seed(0)  # the same anchors and regions are sampled each time
            for batch in self._build_loader():
                for name, loss in self._model(batch).items():
                    sums[name] = sums.get(name, 0.0) + loss.item()
                count += 1
        np.random.set_state(numpy_state)
        for norm, training in zip(norms, was_training, strict=True):
            norm.train(training)
        gathered = comm.gather((sums, count))
        if not comm.is_main_process():
            return
        batches = sum(n for _, n in gathered)
        for name in {name for part, _ in gathered for name in part}:
            mean = sum(part.get(name, 0.0) for part, _ in gathered) / batches
            self.trainer.storage.put_scalar(f"val/{name}", mean, smoothing_hint=False)
        total = sum(sum(part.values()) for part, _ in gathered) / batches
        self.trainer.storage.put_scalar("val/total_loss", total, smoothing_hint=False)
