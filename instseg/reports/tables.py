"""Tables of an evaluation, as text and as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from instseg.evaluation.results import AREAS, CROWDING, TaskResult
from instseg.files import atomic_write

Cell = str | int | float | None
"""None is a value that does not exist, such as the AP of a class without instances."""
BACKGROUND = "(background)"
"""Name of the row of false alarms and of the column of misses."""


@dataclass(frozen=True)
class Table:
    """Named columns.

    Attributes:
        name: of its file, without the suffix.
        title: one line above the text.
        columns: their names.
        rows: their cells.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> str:
        """For a terminal: numbers with four digits, ``-`` for what does not exist."""
        rows = [[_shown(cell) for cell in row] for row in self.rows]
        align = ["left"] + ["right"] * (len(self.columns) - 1)
        table = tabulate(
            rows, self.columns, disable_numparse=True, colalign=align if rows else None
        )
        return f"{self.title}\n{table}\n"

    def write(self, folder: Path) -> None:
        """Write ``NAME.csv`` with all digits."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])
        content = file.getvalue().encode("utf-8", "backslashreplace")
        atomic_write(folder / f"{self.name}.csv", lambda output: output.write(content))

    def as_objects(self) -> list[dict[str, Cell]]:
        """Its rows for JSON."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def overall(result: TaskResult) -> Table:
    """COCO's numbers for all classes."""
    values: dict[str, Cell] = {"task": result.task, "instances": result.num_instances()}
    values |= {"AP": result.ap(), "AP50": result.ap(iou=0.5), "AP75": result.ap(iou=0.75)}
    values |= {f"AP{area[0]}": result.ap(area=area) for area in AREAS[1:]}
    values["AR"] = result.ar()
    values |= {f"AR{area[0]}": result.ar(area=area) for area in AREAS[1:]}
    return _table(f"{result.task}_overall", f"{_what(result)}, per cent", [values])


def by_class(result: TaskResult, score: float) -> Table:
    """COCO's numbers for each class, precision and recall; without classes that nothing has.

    Args:
        score: of precision and recall.
    """
    rows = []
    for number, name in enumerate(result.classes):
        count = result.num_instances(number=number)
        if not count and not np.any(result.outcomes.detection_classes == number):
            continue
        at, best = result.at(score, number), result.best(number)
        values: dict[str, Cell] = {"class": name, "instances": count}
        values |= {
            "AP": result.ap(number=number),
            "AP50": result.ap(iou=0.5, number=number),
            "AP75": result.ap(iou=0.75, number=number),
            **{f"AP{area[0]}": result.ap(area=area, number=number) for area in AREAS[1:]},
            "AR": result.ar(number=number),
            "precision": 100 * at.precision,
            "recall": 100 * at.recall,
            "best F1": 100 * best.f1 if best else None,
            "at score": best.score if best else None,
        }
        rows.append(values)
    title = f"{_what(result)} by class, per cent; precision and recall at score {score:.4f}"
    return _table(f"{result.task}_classes", title, rows)


def by_size(result: TaskResult) -> Table:
    """COCO's numbers for small, medium and large instances."""
    rows: list[dict[str, Cell]] = [
        {
            "size": area,
            "instances": result.num_instances(area=area),
            "AP": result.ap(area=area),
            "AP50": result.ap(iou=0.5, area=area),
            "AP75": result.ap(iou=0.75, area=area),
            "AR": result.ar(area=area),
        }
        for area in AREAS[1:]
    ]
    title = f"{_what(result)} by size (area below 32², below 96², above), per cent"
    return _table(f"{result.task}_sizes", title, rows)


def by_crowding(result: TaskResult, crowding: np.ndarray, score: float) -> Table:
    """Recall of instances whose boxes overlap those of others little or much.

    Args:
        crowding: (G,) of the instances, see :func:`instseg.evaluation.results.crowding`.
        score: of the recall at a score.
    """
    groups = np.searchsorted(CROWDING, crowding)
    lows, highs = [None, *CROWDING], [*CROWDING, None]
    rows: list[dict[str, Cell]] = []
    for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
        chosen = groups == number
        recalled = result.outcomes.recalled[:, chosen]
        above = result.outcomes.hit_scores[chosen] >= score
        name = "0" if low is None else f"above {low:g}"
        rows.append(
            {
                "box IoU with another": name
                if high is None or low is None
                else f"{name} to {high:g}",
                "instances": int(chosen.sum()),
                "AR": _per_cent(recalled),
                "recall": _per_cent(recalled[0]),
                "recall at score": _per_cent(above),
            }
        )
    title = (
        f"{_what(result)} by crowding, per cent; recall at IoU 0.5, of all and at score {score:.4f}"
    )
    return _table(f"{result.task}_crowding", title, rows)


def of_confusion(result: TaskResult, counts: np.ndarray, score: float) -> Table:
    """Instances of each class by the class that they were taken for; without unused classes."""
    names = [*result.classes, BACKGROUND]
    used = np.flatnonzero((counts.sum(axis=0) > 0) | (counts.sum(axis=1) > 0)).tolist()
    used = [number for number in used if number < len(result.classes)] + [len(result.classes)]
    rows: list[list[Cell]] = [
        [names[row], *(int(counts[row, column]) for column in used)] for row in used
    ]
    title = (
        f"confusion of {_what(result)} at IoU 0.5 and score {score:.4f}: rows are true classes, "
        f"columns predicted ones; {BACKGROUND}: false alarms and misses"
    )
    return Table("confusion", title, ["", *(names[column] for column in used)], rows)


def most_confused(table: Table, count: int) -> Table:
    """The most frequent mistakes between classes in a table of :func:`of_confusion`."""
    classes = table.columns[1:]
    pairs: list[tuple[str, str, int]] = [
        (str(row[0]), name, int(cell or 0))
        for row in table.rows
        for name, cell in zip(classes, row[1:], strict=True)
        if BACKGROUND not in (row[0], name) and name != row[0] and cell
    ]
    pairs.sort(key=lambda pair: -pair[2])
    title = f"the {count} most frequent confusions of {len(classes) - 1} classes"
    return Table("confused", title, ("true", "predicted", "instances"), pairs[:count])


def _what(result: TaskResult) -> str:
    return {"segm": "masks", "bbox": "boxes"}[result.task]


def _table(name: str, title: str, rows: Sequence[dict[str, Cell]]) -> Table:
    columns = list(rows[0]) if rows else []
    return Table(name, title, columns, [[_known(cell) for cell in row.values()] for row in rows])


def _known(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def _per_cent(values: np.ndarray) -> float:
    return 100 * float(values.mean()) if values.size else float("nan")
