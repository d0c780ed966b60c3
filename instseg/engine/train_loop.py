"""One optimisation step: mixed precision and the guard against losses that are not finite."""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instseg.errors import ConfigError, TrainingError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class TrainLoop(SimpleTrainer):
    """Detectron2's simple loop plus autocast with loss scaling on any device.

    Training stops on *all* ranks in the iteration in which any loss of any rank stops being finite.
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
            ConfigError: unknown ``amp_dtype``, float16 on a CPU, ``accumulate`` below 1.
        """
        super().__init__(model, data_loader, optimizer)
        self._is_ddp = isinstance(model, DistributedDataParallel)
        self.device = next(model.parameters()).device
        if amp_dtype is not None and amp_dtype not in _DTYPES:
            raise ConfigError(f"SOLVER.AMP.DTYPE is {amp_dtype!r}; expected float16 or bfloat16")
        if amp_dtype == "float16" and self.device.type != "cuda":
            raise ConfigError(
                f"SOLVER.AMP.DTYPE float16 needs a GPU, the model is on {self.device.type}; "
                "set SOLVER.AMP.DTYPE bfloat16 or SOLVER.AMP.ENABLED False"
            )
        if accumulate < 1:
            raise ConfigError(f"SOLVER.ACCUMULATE_BATCHES is {accumulate}; expected at least 1")
        self.accumulate = accumulate
        self.amp_dtype = _DTYPES[amp_dtype] if amp_dtype else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "float16")

    def run_step(self) -> None:
        """Compute losses and gradients of ``accumulate`` batches and step the optimizer."""
        self.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        data_time = 0.0
        for number in range(self.accumulate):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            is_last = number == self.accumulate - 1
            # Gradients are exchanged between processes once, with the last batch.
            with self.model.no_sync() if self._is_ddp and not is_last else nullcontext():
                losses = self._forward(batch)
                total = torch.stack(list(losses.values())).sum()
                self.scaler.scale(total / self.accumulate).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / self.accumulate
        self.after_backward()
        self._write_metrics(means, data_time)
        # Before the step, or an optimizer that unscales by itself would clip scaled gradients.
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        problem = ""
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            try:
                losses = self.model(batch)
            except FloatingPointError as error:  # Detectron2's RPN, before there is a loss
                problem = str(error)
        self._check_finite(losses, batch, problem)
        return losses

    def _check_finite(
        self, losses: dict[str, Tensor], batch: list[dict[str, Any]], problem: str
    ) -> None:
        """Stop all ranks if a loss of any is not finite, or its model reports a ``problem``."""
        bad = torch.tensor(bool(problem), device=self.device)
        for loss in losses.values():
            bad = bad | ~torch.isfinite(loss.detach())
        if comm.get_world_size() > 1:
            bad = bad.float()
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if not bad:
            return
        report = ""
        terms = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)}
        if terms or problem:
            files = ", ".join(str(record.get("file_name", "?")) for record in batch)
            values = problem or ", ".join(f"{name} = {value}" for name, value in terms.items())
            report = f"rank {comm.get_rank()}: {values}; images {files}"
        reports = [text for text in comm.all_gather(report) if text]
        raise TrainingError(
            f"the loss is not finite at iteration {self.iter}: {' | '.join(reports)}. "
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or clip gradients with "
            "SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])
