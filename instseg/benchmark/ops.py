"""``instseg benchmark ops``: each compiled operator against a composition of common operators."""

import logging
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg.benchmark.comparisons import COMPARISONS, OperatorComparison
from instseg.benchmark.rows import (
    Row,
    forget_peak,
    in_fresh_process,
    peak_resident,
    seconds,
)
from instseg.errors import ConfigError

logger = logging.getLogger(__name__)


def benchmark_ops(
    device: str = "cpu", repeats: int = 5, names: Sequence[str] | None = None
) -> list[Row]:
    """Compare every operator with its peer, by turns in this process.

    A fresh process for each measures peak memory.

    Args:
        device: on which both run.
        repeats: the median of so many calls is reported.
        names: of the rows wanted; None for all.
    Raises:
        ConfigError: no such device or row, or fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}; expected at least 1")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"--device is {device}; expected cpu, or cuda on a machine with a GPU")
    names = list(COMPARISONS) if names is None else names
    for name in names:
        if name not in COMPARISONS:
            raise ConfigError(f"--op is {name}; expected one of {', '.join(COMPARISONS)}")
    bandwidth = _bytes_per_second(torch.device(device))
    return [
        _benchmark_op(name, COMPARISONS[name], torch.device(device), repeats, bandwidth)
        for name in names
        if _can_run(name, COMPARISONS[name], device)
    ]


def _can_run(name: str, comparison: OperatorComparison, device: str) -> bool:
    if device != "cpu" and not comparison.on_gpu:
        logger.warning(f"{name} is left out: it runs on a CPU alone")
        return False
    if comparison.needs is None or find_spec(comparison.needs) is not None:
        return True
    logger.warning(f"{name} is left out: its peer needs {comparison.needs}, of the extra `test`")
    return False


def _benchmark_op(
    name: str, comparison: OperatorComparison, device: torch.device, repeats: int, bandwidth: float
) -> Row:
    inputs = comparison.inputs(device, False)
    their_inputs = comparison.their_inputs(*inputs)

    def ours() -> Any:
        return comparison.ours(*inputs)

    def theirs() -> Any:
        return comparison.theirs(*their_inputs)

    moved_bytes = _bytes(inputs) + _bytes(ours())
    our_times, peer_times = [], []
    for i in range(repeats):
        our_times.append(seconds(ours))
        if i == 0 or not comparison.slow:
            peer_times.append(seconds(theirs))
    ours_ms, peer_ms = (1000 * statistics.median(times) for times in (our_times, peer_times))
    ours_beside = in_fresh_process(_memory_beside_inputs, name, "ours", str(device))
    peer_beside = None
    if not comparison.slow:
        peer_beside = in_fresh_process(_memory_beside_inputs, name, "theirs", str(device))
    measured = bool(ours_beside and peer_beside)
    ours_peak, peer_peak = (
        (beside or 0) + _bytes(arguments) / 2**20
        for beside, arguments in ((ours_beside, inputs), (peer_beside, their_inputs))
    )
    return Row(
        name=name,
        peer=comparison.peer,
        ours_ms=ours_ms,
        peer_ms=peer_ms,
        ratio_time=peer_ms / ours_ms,
        ratio_memory=peer_peak / ours_peak if measured else None,
        ratio_own_memory=peer_beside / ours_beside if ours_beside and peer_beside else None,
        peak_memory_mib=ours_peak if measured else None,
        floor_ms=1000 * moved_bytes / bandwidth,
    )


def _memory_beside_inputs(name: str, kind: str, device_name: str) -> float | None:
    """MiB that one call takes beside its inputs, in this process; its results are part of it."""
    comparison, device = COMPARISONS[name], torch.device(device_name)
    call = getattr(comparison, kind)
    for tiny in (True, False):  # the first loads libraries and starts threads
        inputs = comparison.inputs(device, tiny)
        if kind == "theirs":
            inputs = comparison.their_inputs(*inputs)
        before = _forget_peak(device)
        call(*inputs)
    after = _peak(device)
    return None if before is None or after is None else after - before


def _forget_peak(device: torch.device) -> float | None:
    """Count the peak of memory from now on; return what is in use (MiB), None where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    return _peak(device)


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident()


def _bytes_per_second(device: torch.device) -> float:
    """Memory bandwidth: the best of a few copies of a tensor that fits into no cache."""
    source = torch.zeros(2**26, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / min(seconds(copy) for _ in range(5))


def _bytes(values: Any) -> int:
    """Size of all tensors and arrays in nested tuples."""
    if isinstance(values, Tensor | np.ndarray):
        return int(values.nbytes)
    return sum(map(_bytes, values)) if isinstance(values, tuple | list) else 0
