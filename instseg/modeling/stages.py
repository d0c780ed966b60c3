"""Names for the stages of a prediction, so that a benchmark can time them in any model."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_times: ContextVar[dict[str, float] | None] = ContextVar("instseg_stage_times", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Time the code of a stage inside, if :func:`stage_times` is listening.

    Stages of one name add up.  They must not contain each other, or time would count twice.
    """
    times = _times.get()
    if times is None:
        yield
        return
    start = now()
    yield
    times[name] = times.get(name, 0.0) + now() - start


@contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Collects the seconds of every stage that runs inside, by name."""
    times: dict[str, float] = {}
    token = _times.set(times)
    try:
        yield times
    finally:
        _times.reset(token)


def now() -> float:
    """Seconds of a steady clock, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
