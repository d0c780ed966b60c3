"""Compare trainings by the files in their folders."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from instseg.errors import ConfigError, reason_of
from instseg.evaluation import lower_is_better
from instseg.reports.tables import Cell, Table

_ENDS = ("/AP", "/AR@100", "/SBD")
"""Ends of the names of the metrics that are shown unless others are asked for."""
_NOT_COMPARED = ("OUTPUT_DIR",)
_LONGEST = 60
"""Characters of a value of the configuration on a terminal."""


@dataclass(frozen=True)
class Measured:
    """A metric of a training.

    Attributes:
        best, best_iteration: the best value, and the iteration in the log at which it was measured.
        last: the last value.
    """

    best: float
    best_iteration: int
    last: float


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        folder: its OUTPUT_DIR, as given.
        iterations: done so far; None without a log.
        max_iterations: those that were asked for; None if unknown.
        seconds: that its iterations took, without evaluations; None if unknown.
        metrics: name → values.
        config: key → value; None without a configuration.
    """

    folder: str
    iterations: int | None
    max_iterations: int | None
    seconds: float | None
    metrics: dict[str, Measured]
    config: dict[str, Any] | None


def read_run(folder: Path, names: Sequence[str]) -> tuple[Run, list[str]]:
    """A training, and a line about each of its files that is missing or damaged.

    Args:
        folder: its OUTPUT_DIR.
        names: metrics such as ``segm/AP``; none for those that end in one of AP, AR@100 and SBD.
    """
    problems: list[str] = []
    records: list[dict[str, Any]] = []
    config = None
    try:
        records = _records(folder / "metrics.json", problems)
    except ConfigError as error:
        problems.append(str(error))
    try:
        config = _config(folder / "config.yaml")
    except ConfigError as error:
        problems.append(str(error))
    # A training that was resumed repeats iterations; the last record of each counts.
    training = {r["iteration"]: r for r in records if _is_number(r.get("time"))}
    iterations = max(training) + 1 if training else None
    run = Run(
        folder=str(folder),
        iterations=iterations,
        max_iterations=None if config is None else config.get("SOLVER.MAX_ITER"),
        seconds=_seconds(training) if training else None,
        metrics=_measured(records, names),
        config=config,
    )
    return run, problems


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Key → values of each run, None where it has none, of the keys that are not alike in all.

    Runs without a configuration count for nothing.
    """
    known = [run.config for run in runs if run.config is not None]
    keys = dict.fromkeys(key for config in known for key in config if key not in _NOT_COMPARED)
    return {
        key: [None if run.config is None else run.config.get(key) for run in runs]
        for key in sorted(keys)
        if any(config.get(key) != known[0].get(key) for config in known)
    }


def tables(runs: Sequence[Run]) -> list[Table]:
    """What the runs reached, and the keys in which they differ."""
    names = _names(runs)
    columns = ["run", "iterations", "time"]
    columns += [column for name in names for column in (f"best {name}", "at", f"last {name}")]
    rows: list[list[Cell]] = []
    for run in runs:
        row: list[Cell] = [run.folder, _iterations(run), _duration(run.seconds)]
        for name in names:
            measured = run.metrics.get(name)
            if measured is None:
                row += [None, None, None]
            else:
                row += [measured.best, measured.best_iteration, measured.last]
        rows.append(row)
    title = "trainings; time is that of the iterations, without evaluations"
    results = Table("runs", title, columns, rows)
    different = differences(runs)
    values: list[list[Cell]] = [[key, *map(_text, row)] for key, row in different.items()]
    title = "keys of config.yaml that differ" if values else "no key of config.yaml differs"
    keys = Table("keys", title, ["key", *(run.folder for run in runs)] if values else [], values)
    return [results, keys]


def as_json(runs: Sequence[Run]) -> str:
    """The same as JSON; a value that does not exist is null."""
    entries = [
        {
            "run": run.folder,
            "iterations": run.iterations,
            "max_iterations": run.max_iterations,
            "seconds": run.seconds,
            "metrics": {
                name: {"best": m.best, "best_iteration": m.best_iteration, "last": m.last}
                for name, m in run.metrics.items()
            },
        }
        for run in runs
    ]
    content = {"runs": entries, "different_keys": differences(runs)}
    return json.dumps(content, indent=1, default=str)


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The records in the log of a training; tells of damaged lines in ``problems``."""
    lines = _content(path).split(b"\n")
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("iteration")) is int:
            records.append(record)
        else:
            damaged.append(number)
    if not records:
        raise ConfigError(f"{path} holds no record of a training")
    if damaged:
        problems.append(
            f"{path}: {len(damaged)} of {len(damaged) + len(records)} lines are damaged and left "
            f"out, first line {damaged[0]}"
        )
    return records


def _config(path: Path) -> dict[str, Any]:
    """Key with dots → value."""
    try:
        content = yaml.safe_load(_content(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no configuration")
    return _flat(content, "")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _flat(node: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _seconds(training: Mapping[int, Mapping[str, Any]]) -> float:
    """Each record has the seconds of an iteration since the record before it."""
    seconds, done = 0.0, 0
    for iteration in sorted(training):
        seconds += training[iteration]["time"] * (iteration + 1 - done)
        done = iteration + 1
    return seconds


def _measured(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Measured]:
    values: dict[str, list[tuple[float, int]]] = {}
    for record in records:
        for name, value in record.items():
            wanted = name in names if names else "/" in name and name.endswith(_ENDS)
            if wanted and _is_number(value):
                values.setdefault(name, []).append((value, record["iteration"]))
    measured = {}
    for name, pairs in sorted(values.items()):
        best, iteration = (min if lower_is_better(name) else max)(pairs, key=lambda pair: pair[0])
        measured[name] = Measured(best, iteration, pairs[-1][0])
    return measured


def _names(runs: Sequence[Run]) -> list[str]:
    """Metrics that some run has."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _iterations(run: Run) -> str | None:
    if run.iterations is None:
        return None
    return f"{run.iterations}" + (f" of {run.max_iterations}" if run.max_iterations else "")


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
