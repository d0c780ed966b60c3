"""One optimisation step: mixed precision and the guard against losses that are not finite."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

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
    ) -> None:
        """
        Args:
            model: returns a dict of scalar losses in training mode; may be a
                DistributedDataParallel.
            data_loader: endless batches, lists of Detectron2 records.
            optimizer: over the parameters of ``model``.
            amp_dtype: None for float32, else ``float16`` (CUDA only) or ``bfloat16``.
        Raises:
            ConfigError: unknown ``amp_dtype``, or float16 on a CPU.
        """
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        if amp_dtype is not None and amp_dtype not in _DTYPES:
            raise ConfigError(f"SOLVER.AMP.DTYPE is {amp_dtype!r}; expected float16 or bfloat16")
        if amp_dtype == "float16" and self.device.type != "cuda":
            raise ConfigError(
                f"SOLVER.AMP.DTYPE float16 needs a GPU, the model is on {self.device.type}; "
                "set SOLVER.AMP.DTYPE bfloat16 or SOLVER.AMP.ENABLED False"
            )
        self.amp_dtype = _DTYPES[amp_dtype] if amp_dtype else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "float16")

    def run_step(self) -> None:
        """Fetch a batch, compute losses and gradients, and step the optimizer."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            losses: dict[str, Tensor] = self.model(batch)
        self._check_finite(losses, batch)
        self.optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        self.scaler.scale(total).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _check_finite(self, losses: dict[str, Tensor], batch: list[dict[str, Any]]) -> None:
        bad = ~torch.isfinite(
            torch.stack([loss.detach().float() for loss in losses.values()])
        ).all()
        if comm.get_world_size() > 1:
            bad = bad.float()
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if not bad:
            return
        report = ""
        terms = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)}
        if terms:
            files = ", ".join(str(record.get("file_name", "?")) for record in batch)
            values = ", ".join(f"{name} = {value}" for name, value in terms.items())
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
