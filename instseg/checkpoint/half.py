"""Weights in half precision, which take half the room and change results by less than training."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from instseg.errors import CheckpointError

_STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of what batch normalisation measured."""
_STEP = 2.0**-10
"""Largest relative change by rounding to float16 where its exponents suffice."""


@dataclass(frozen=True)
class Halved:
    """Weights in half precision.

    Attributes:
        weights: name -> tensor, float16 or as it was.
        kept: names of the floating-point tensors that stay as they were.
        change: largest change of a value, relative to the largest value of its tensor.
        changed: name of the tensor with that change; "" if nothing changed.
    """

    weights: dict[str, Tensor]
    kept: tuple[str, ...]
    change: float
    changed: str


def halve(weights: Mapping[str, Tensor]) -> Halved:
    """Round floating-point tensors to float16.

    A statistic of batch normalisation stays as it is if float16 would change one of its values by
    more than 1 / 1024: a variance may be of any size, and it divides.  Whole numbers stay as well.

    Args:
        weights: finite CPU tensors by name.
    Raises:
        CheckpointError: another tensor has a value beyond the range of float16, 65504.
    """
    halved, kept, change, changed = {}, [], 0.0, ""
    for name, value in weights.items():
        halved[name] = value
        if not value.is_floating_point() or not value.numel():
            continue
        half = value.half()
        error = (half.double() - value.double()).abs()
        if name.rpartition(".")[2] in _STATISTICS and (error > _STEP * value.double().abs()).any():
            kept.append(name)
            continue
        largest = float(value.double().abs().max())
        if not torch.isfinite(half).all():
            raise CheckpointError(
                f"{name} has a value of {largest:.4g}; expected at most "
                f"{torch.finfo(torch.float16).max:g}, the largest number of half precision"
            )
        halved[name] = half
        relative = float(error.max()) / largest if largest else 0.0
        if relative > change:
            change, changed = relative, name
    return Halved(halved, tuple(kept), change, changed)
