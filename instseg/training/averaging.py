"""An average of the weights over the last iterations, which is better than the last weights.

A trained network circles around a minimum, whose middle the average is nearer to (Polyak and
Juditsky, 1992).  The average is exponential, as in Mean Teacher (Tarvainen and Valpola, 2017, arXiv
1703.01780) and YOLOX (Ge et al., 2021, arXiv 2107.08430).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

Weights = dict[str, Tensor]


class AveragedWeights(HookBase):
    """The exponential moving average of a model's weights (``SOLVER.EMA``).

    After n steps the average moves towards the weights by 1 - min(DECAY, (1 + n) / (10 + n)): it
    forgets the start of a training, and a short one is averaged over its last tenth.

    Averaged are parameters that are trained, and buffers of floating-point numbers that are saved,
    such as the running statistics of normalisation; frozen parameters and counts stay those of the
    model.  Weights that are not finite do not enter; the loss stops the training one step later.

    Evaluations and validation losses use the average.  In checkpoints ``model`` is the average,
    which any Detectron2 code loads; the weights that training goes on with are beside it.  In
    several processes each averages for itself, with the same result but for buffers that differ.

    Must run before all hooks that use or save weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: not a DistributedDataParallel.
            decay: share of the average that stays at each step, once it has warmed up.
        """
        self._model = model
        self._decay = decay
        self._steps = 0
        self._average: Weights = {}
        self._held: Weights | None = None  # the trained weights while the model has the average

    def before_train(self) -> None:
        if not self._average:
            self._average = {name: x.detach().clone() for name, x in self._trained().items()}

    @torch.no_grad()
    def after_step(self) -> None:
        trained = self._trained()
        if not get_total_norm(trained.values()).isfinite():
            return
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        averages = [self._average[name] for name in trained]
        get_ema_multi_avg_fn(decay)(averages, list(trained.values()), self._steps)

    def model_weights(self) -> Weights:
        """The complete weights of the model with the average."""
        return {**self._model.state_dict(), **self._average}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the model has the average."""
        self._held = {name: x.detach().clone() for name, x in self._trained().items()}
        try:
            self._set(self._average)
            yield
        finally:
            self._set(self._held)
            self._held = None

    def state_dict(self) -> dict[str, Any]:
        """The weights that training goes on with; the checkpoint's ``model`` is the average."""
        return {"steps": self._steps, "trained": self._held or self._trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, after the model has loaded the average.

        Raises:
            KeyError, ValueError: the state of another model.
        """
        trained, ours = state_dict["trained"], self._trained()
        if trained.keys() != ours.keys():
            different = sorted(trained.keys() ^ ours.keys())
            raise ValueError(f"other weights are averaged: {', '.join(different[:3])}")
        self._steps = int(state_dict["steps"])
        self._average = {name: x.detach().clone() for name, x in ours.items()}
        self._set(trained)

    def _trained(self) -> Weights:
        """What is averaged, as it is in the model."""
        tensors: Weights = self._model.state_dict(keep_vars=True)
        return {
            name: x.detach()
            for name, x in tensors.items()
            if x.is_floating_point() and (x.requires_grad or not isinstance(x, nn.Parameter))
        }

    @torch.no_grad()
    def _set(self, weights: Weights) -> None:
        for name, tensor in self._trained().items():
            tensor.copy_(weights[name])
