"""One optimisation step: mixed precision, and all processes stop when one cannot go on."""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instseg.errors import ConfigError, InstsegError, TrainingError, message
from instseg.training.interruption import signals_held
from instseg.training.memory_format import match_memory_format

logger = logging.getLogger(__name__)

_RESUMED = {
    "initial_lr": "SOLVER.BASE_LR",
    "momentum": "SOLVER.MOMENTUM",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
}
"""Value that an optimizer saves → the key that sets it."""
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def mistakes_unlogged() -> Iterator[None]:
    """Keep tracebacks of user errors out of Detectron2's training log.

    The error itself passes through; its handler prints one line.
    """

    def is_no_mistake(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], InstsegError))

    log = logging.getLogger(TrainerBase.__module__)
    log.addFilter(is_no_mistake)
    try:
        yield
    finally:
        log.removeFilter(is_no_mistake)


class TrainLoop(SimpleTrainer):
    """Detectron2's simple loop plus autocast with loss scaling on any device.

    Training stops on *all* ranks in the iteration in which any loss of any rank stops being finite,
    or a rank gets no loss at all, e.g. because it cannot read an image.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: str | None = None,
        accumulate: int = 1,
    ) -> None:
        """
        Args:
            model: returns a dict of scalar losses in training mode; may be a
                DistributedDataParallel.
            data_loader: endless batches, lists of Detectron2 records.
            optimizer: over the parameters of ``model``.
            amp_dtype: None for float32, else ``float16`` (CUDA only) or ``bfloat16``.
            accumulate: batches per step; their gradients are averaged.
        Raises:
            ConfigError: float16 on a CPU.
        """
        super().__init__(model, data_loader, optimizer)
        self._data_loader_iter_obj: Iterator[list[dict[str, Any]]] | None = None
        self._is_ddp = isinstance(model, DistributedDataParallel)
        self.device = next(model.parameters()).device
        if amp_dtype == "float16" and self.device.type != "cuda":
            raise ConfigError(
                f"SOLVER.AMP.DTYPE float16 needs a GPU, the model is on {self.device.type}; "
                "set SOLVER.AMP.DTYPE bfloat16 or SOLVER.AMP.ENABLED False"
            )
        self.accumulate = accumulate
        self.amp_dtype = _DTYPES[amp_dtype] if amp_dtype else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "float16")

    def run_step(self) -> None:
        """Compute losses and gradients of ``accumulate`` batches and step the optimizer."""
        self.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        data_time = 0.0
        for number in range(self.accumulate):
            is_last = number == self.accumulate - 1
            # Gradients are exchanged between processes once, with the last batch.
            with self.model.no_sync() if self._is_ddp and not is_last else nullcontext():
                losses, waited = self._forward()
                total = torch.stack(list(losses.values())).sum()
                self.scaler.scale(total / self.accumulate).backward()
            data_time += waited
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / self.accumulate
        self.after_backward()
        self._write_metrics(means, data_time)
        # Before the step, since an optimizer that unscales by itself would clip scaled gradients.
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def _data_loader_iter(self) -> Iterator[list[dict[str, Any]]]:
        """Detectron2's iterator; its worker processes start where no signal reaches them."""
        if self._data_loader_iter_obj is None:
            with signals_held():
                batches = iter(self.data_loader)
                self._data_loader_iter_obj = itertools.chain([next(batches)], batches)
        return self._data_loader_iter_obj

    def _forward(self) -> tuple[dict[str, Tensor], float]:
        """Losses of the next batch, and the seconds that its data took."""
        batch: list[dict[str, Any]] = []
        losses: dict[str, Tensor] = {}
        waited = 0.0
        failure: Exception | None = None
        try:
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            waited = time.perf_counter() - start
            with torch.autocast(
                self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                losses = self.model(batch)
        except Exception as error:  # raised below, when no other process waits for this one
            failure = type(error)(message(error)) if isinstance(error, InstsegError) else error
        self._check(losses, batch, failure)
        return losses, waited

    def _check(
        self, losses: dict[str, Tensor], batch: list[dict[str, Any]], failure: Exception | None
    ) -> None:
        """Stop all ranks if any of them has a loss that is not finite, or a ``failure``."""
        # Detectron2's RPN raises this by itself, before there is a loss.
        is_divergence = isinstance(failure, FloatingPointError)
        several = comm.get_world_size() > 1
        if failure is not None and not several and not is_divergence:
            raise failure
        must_stop = torch.tensor(failure is not None, device=self.device)
        for loss in losses.values():
            must_stop = must_stop | ~torch.isfinite(loss.detach())
        if several:
            must_stop = must_stop.float()
            torch.distributed.all_reduce(must_stop, op=torch.distributed.ReduceOp.MAX)
        if not must_stop:
            return
        diverged, failed = "", ""
        terms = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)}
        if terms or is_divergence:
            files = ", ".join(str(record.get("file_name", "?")) for record in batch)
            values = ", ".join(f"{name} = {value}" for name, value in terms.items()) or failure
            diverged = f"rank {comm.get_rank()}: {values}; images {files}"
        elif failure is not None:
            failed = f"rank {comm.get_rank()}: {type(failure).__name__}: {failure}"
        reports = comm.all_gather((diverged, failed))
        if failed and failure is not None and not isinstance(failure, InstsegError):
            raise failure  # a defect keeps its traceback
        raise TrainingError(self._explain(reports)) from failure

    def _explain(self, reports: list[tuple[str, str]]) -> str:
        """The error message for the (divergence, other failure) that each rank reports."""
        if failed := " | ".join(text for _, text in reports if text):
            return f"training cannot go on at iteration {self.iter}: {failed}"
        diverged = " | ".join(text for text, _ in reports if text)
        return (
            f"the loss is not finite at iteration {self.iter}: {diverged}. "
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or clip gradients with "
            "SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as Detectron2 does, and that of the scaler.

        Raises:
            ValueError: the state of another optimizer.
        """
        # Loading replaces configured values, even with those of another kind of optimizer.
        configured = [dict(group) for group in self.optimizer.param_groups]
        try:
            super().load_state_dict(state_dict)
            groups = self.optimizer.param_groups
            lacking = sorted(self.optimizer.defaults.keys() - groups[0].keys())
        except KeyError as error:
            lacking = [str(error)]
        if lacking:
            raise ValueError(
                f"it has no {', '.join(lacking)} for {type(self.optimizer).__name__}, so it is "
                "another optimizer's, or damaged; set SOLVER.OPTIMIZER to that one"
            )
        for name, key in _RESUMED.items():
            configured_values = [group[name] for group in configured if name in group]
            loaded_values = [group[name] for group in groups if name in group]
            if configured_values != loaded_values:
                logger.warning(
                    f"{key} differs from the checkpoint's, and training goes on with the "
                    f"checkpoint's {loaded_values[0]:g}; to use another value, start anew with the "
                    "checkpoint as MODEL.WEIGHTS"
                )
        match_memory_format(self.optimizer)
        self.scaler.load_state_dict(state_dict["scaler"])
