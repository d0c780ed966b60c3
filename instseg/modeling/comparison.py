"""Comparisons that a model declares between two ways to compute the same, for the benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute the same.

    Attributes:
        name: what is computed.
        peer: the other way to do it.
        ours, theirs: run one of them.
        share: the part of the work that ``theirs`` does, where all of it would take too long; its
            time is divided by this.
    """

    name: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    share: float = 1.0


@runtime_checkable
class ComparedModel(Protocol):
    """A meta-architecture with comparisons of its own."""

    def comparisons(self, image: Tensor) -> Sequence[Comparison]:
        """What to compare on a picture (3, H, W) of values 0..255."""
