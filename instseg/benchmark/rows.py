"""Shared by the benchmarks: the row of a table, timing, peak memory, the report."""

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from instseg.errors import InstsegError
from instseg.files import atomic_write
from instseg.modeling import now
from instseg.processes import end_with

T = TypeVar("T")
logger = logging.getLogger(__name__)

_OPTIONAL = (
    *("ratio_memory", "ratio_own_memory", "floor_ms", "f1", "peer_f1"),
    *("cpu_ms", "peer_cpu_ms", "ratio_cpu", "data_ms", "peer_data_ms"),
    *("gflops", "share_of_peak", "note"),
)
"""Columns that a report has if a row has a value for them."""


@dataclass(frozen=True)
class Row:
    """One comparison.  Times are milliseconds per image (models), call (operators) or step
    (training).

    The ratios are peer / ours, above 1 ours is ahead; None where there is no peer or peak memory
    cannot be measured.
    ``ratio_memory`` counts the inputs, ``ratio_own_memory`` what a call takes beside them.
    ``stages_ms`` splits ``ours_ms`` by the parts of the model.  ``floor_ms`` is how long it takes
    to move the bytes that an operator must read and write.  ``f1`` and ``peer_f1`` say
    how good both results are.  ``cpu_ms`` and ``peer_cpu_ms`` are CPU time of all threads,
    ``data_ms`` and ``peer_data_ms`` the wait for data of a step.  ``gflops`` is how many 10^9
    multiplications and additions a second the network's convolutions make, ``share_of_peak`` that
    as a part of what this processor can do in their number type, and ``note`` what it lacks.
    """

    name: str
    peer: str
    ours_ms: float
    peer_ms: float | None
    ratio_time: float | None
    ratio_memory: float | None
    ratio_own_memory: float | None = None
    images_per_second: float | None = None
    peak_memory_mib: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    floor_ms: float | None = None
    f1: float | None = None
    peer_f1: float | None = None
    cpu_ms: float | None = None
    peer_cpu_ms: float | None = None
    ratio_cpu: float | None = None
    data_ms: float | None = None
    peer_data_ms: float | None = None
    gflops: float | None = None
    share_of_peak: float | None = None
    note: str | None = None


def report(rows: Sequence[Row], json_file: Path | None) -> str:
    """A table of ``rows``; also written as a JSON list to ``json_file``.

    Raises:
        OutputError: the file cannot be written.
    """
    if json_file is not None:
        content = json.dumps([asdict(row) for row in rows], indent=2).encode() + b"\n"
        atomic_write(str(json_file), lambda file: file.write(content))
    columns = ["name", "peer", "ours_ms", "peer_ms", "ratio_time"]
    for column in _OPTIONAL:
        if any(getattr(row, column) is not None for row in rows):
            columns.append(column)
    table = tabulate(
        [[getattr(row, column) for column in columns] for row in rows],
        headers=columns,
        tablefmt="github",
        floatfmt=".2f",
        missingval="-",
    )
    stages = [
        f"{row.name}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in row.stages_ms.items())
        for row in rows
        if row.stages_ms
    ]
    return "\n".join([table, "", *stages]).rstrip()


def seconds(run: Callable[[], Any]) -> float:
    """Seconds that one call takes, with the work that it leaves running on the GPU."""
    start = now()
    run()
    return now() - start


def cpu_and_wall(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor, all threads together, and of the clock that one call takes."""
    cpu = time.process_time()
    wall = seconds(run)
    return time.process_time() - cpu, wall


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T | None:
    """``function(*arguments)``, computed by a new process; None, with a warning, if that fails.

    Raises:
        InstsegError: as the function does.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(os.getpid(), sender, function, *arguments))
    process.start()
    sender.close()
    try:
        result: T | InstsegError | None = receiver.recv()
    except EOFError:
        result = None
        process.join()  # the status is not known before
        logger.warning(f"the process that measures ended with status {process.exitcode}")
    process.join()
    if isinstance(result, InstsegError):
        raise result
    return result


def _send(parent: int, sender: Any, function: Callable[..., Any], *arguments: Any) -> None:
    end_with(parent)
    try:
        result = function(*arguments)
    except InstsegError as error:
        result = error
    sender.send(result)


def peak_resident() -> float | None:
    """Peak memory of this process in MiB; None if the system does not tell."""
    try:
        # getrusage would count the memory that the parent had when it started this process.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    except (OSError, IndexError, ValueError):  # not on Linux
        return None


def forget_peak() -> None:
    """Make :func:`peak_resident` count from now on, where the system can do that."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # peaks then include memory that was in use before
        logger.warning("this system cannot reset the peak of memory; ratios may come out lower")
