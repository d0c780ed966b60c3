"""Compare results with the ground truth of a data set."""

import json
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instseg.data.dataset import DataSet
from instseg.errors import ConfigError, OutputError
from instseg.evaluation.results import (
    Operating,
    TaskResult,
    confusion,
    crowding,
    evaluate_task,
    within_limit,
)
from instseg.files import atomic_write
from instseg.predict.sources import prepare_output
from instseg.reports.plots import plot_confusion, plot_precision_recall, require_matplotlib
from instseg.reports.reading import CheckedResults, read_dataset, read_results
from instseg.reports.tables import (
    Table,
    by_class,
    by_crowding,
    by_size,
    most_confused,
    of_confusion,
    overall,
)
from instseg.reports.worst import draw_worst, in_order_of_ids, outcomes_by_image

logger = logging.getLogger(__name__)

GROUPS = ("size", "class", "crowding")
"""What ``--by`` takes."""
_MADE_BY = "instseg evaluate"
_START = f'{{\n "made_by": "{_MADE_BY}"'.encode()
"""Of a ``metrics.json`` that an evaluation wrote."""
_SCORE = 0.5
"""Of precision and recall where no detection hits."""
_MOST_CLASSES = 12
"""In a confusion table on a terminal."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Arguments of ``instseg evaluate``.

    Attributes:
        results: a file of results, see :mod:`instseg.predict.result_file`.
        dataset: its name.
        by: some of :data:`GROUPS`.
        score: of precision, recall, confusions and images; None for that with the best F1.
        max_detections: that count per image and class.
        output: folder for files; None writes none.
        worst: number of images to draw there.
    """

    results: Path
    dataset: str
    by: tuple[str, ...] = ("size", "class")
    score: float | None = None
    max_detections: int = 100
    output: Path | None = None
    worst: int = 20

    def __post_init__(self) -> None:
        unknown = [name for name in self.by if name not in GROUPS]
        if unknown or not self.by:
            raise ConfigError(
                f"--by has {unknown[0] if unknown else ''!r}; expected one or more of "
                f"{', '.join(GROUPS)}, with commas between them"
            )
        if self.score is not None and not math.isfinite(self.score):
            raise ConfigError(f"--score is {self.score}; expected a finite number")
        for name in ("max_detections", "worst"):
            least = int(name == "max_detections")
            value, option = getattr(self, name), name.replace("_", "-")
            if value < least:
                raise ConfigError(f"--{option} is {value}; expected at least {least}")


@dataclass(frozen=True)
class _Task:
    """A task's numbers, its tables, the score of precision and recall, and where F1 is best."""

    result: TaskResult
    score: float
    best: Operating | None
    tables: dict[str, Table]


def evaluate(options: EvaluateOptions) -> tuple[list[Table], int]:
    """Evaluate results, and write the files of ``options.output``.

    ``metrics.json`` holds all numbers, and a CSV each table.  ``precision_recall.png`` and
    ``confusion.png`` are plots, and ``worst/`` has the images with the most misses and false
    alarms.  All but the tables of the two tasks are about masks, or boxes if there are no masks.

    Returns:
        the tables for a terminal, and the number of images that could not be drawn.
    Raises:
        ConfigError, DatasetError: results or data set cannot be used.
        OutputError: a file cannot be written, or there is one that no evaluation wrote.
    """
    if options.output is not None:
        require_matplotlib()
    dataset = read_dataset(options.dataset)
    checked = read_results(options.results, dataset)
    if options.output is not None:
        prepare_output(options.output, ())
        _check_free(options.output)
    _warn_of_limit(dataset, options.max_detections)
    tasks = [_task(options, dataset, checked, name) for name in checked.tasks]
    main = tasks[-1]
    counted = within_limit(checked.records, options.max_detections)
    counts = confusion(dataset.coco, counted, main.result.task, main.score)
    confusions = of_confusion(main.result, counts, main.score)
    shown = [table for task in tasks for table in task.tables.values()]
    few = len(confusions.rows) <= _MOST_CLASSES
    operating = _operating(tasks)
    shown += [operating, confusions if few else most_confused(confusions, _MOST_CLASSES)]
    if options.output is None:
        return shown, 0
    failures = _write(options, dataset, checked, tasks, operating, confusions)
    return shown, failures


def _task(options: EvaluateOptions, dataset: DataSet, checked: CheckedResults, name: str) -> _Task:
    result = evaluate_task(dataset.coco, checked.records, name, options.max_detections)
    best = result.best()
    score = options.score
    if score is None:
        score = _SCORE if best is None else best.score
    tables = {"overall": overall(result)}
    if "class" in options.by:
        tables["by_class"] = by_class(result, score)
    if "size" in options.by:
        tables["by_size"] = by_size(result)
    if "crowding" in options.by:
        overlaps = crowding(dataset.coco, result.outcomes.instances)
        tables["by_crowding"] = by_crowding(result, overlaps, score)
    return _Task(result, score, best, tables)


def _warn_of_limit(dataset: DataSet, limit: int) -> None:
    counts = Counter(
        (annotation["image_id"], annotation["category_id"])
        for annotation in dataset.coco.anns.values()
        if not annotation["iscrowd"]
    )
    largest = max(counts.values(), default=0)
    if largest > limit:
        logger.warning(
            "data set %s has up to %d instances of a class in an image, of which %d can be hit at "
            "most; --max-detections %d lets all count, unlike COCO's own numbers",
            *(dataset.name, largest, limit, largest),
        )


def _operating(tasks: list[_Task]) -> Table:
    """Precision and recall over all classes, at the score that was asked for and at the best."""
    columns = ("task", "score", "precision", "recall", "F1", "hits", "false alarms", "misses")
    rows = []
    for task in tasks:
        points = [("", task.result.at(task.score)), (" (best F1)", task.best)]
        if points[1][1] is not None and points[1][1].score == task.score:
            points = points[1:]
        for note, at in points:
            if at is not None:
                ratios = (at.precision, at.recall, at.f1)
                per_cent = [None if math.isnan(ratio) else 100 * ratio for ratio in ratios]
                counts = (at.hits, at.false_alarms, at.misses)
                rows.append([task.result.task, f"{at.score:.4f}{note}", *per_cent, *counts])
    title = "precision and recall at IoU 0.5, all classes together, per cent"
    return Table("precision_recall", title, columns, rows)


def _write(
    options: EvaluateOptions,
    dataset: DataSet,
    checked: CheckedResults,
    tasks: list[_Task],
    operating: Table,
    confusions: Table,
) -> int:
    assert options.output is not None
    folder, main = options.output, tasks[-1]
    images = outcomes_by_image(main.result, len(dataset.records), main.score)
    rows = _image_rows(dataset, images)
    columns = ("image_id", "file_name", "hits", "misses", "false alarms")
    per_image = Table("images", "", columns, rows)
    content: dict[str, Any] = {
        "made_by": _MADE_BY,
        "results": str(options.results),
        "dataset": dataset.name,
        "images": len(dataset.records),
        "detections": len(checked.records),
        "max_detections": options.max_detections,
        "tasks": {
            task.result.task: {
                "score": task.score,
                **{key: table.as_objects() for key, table in task.tables.items()},
            }
            for task in tasks
        },
        "precision_recall": operating.as_objects(),
        "confusion": {
            "task": main.result.task,
            "iou": 0.5,
            "score": main.score,
            "classes": list(confusions.columns[1:]),
            "counts": [list(row[1:]) for row in confusions.rows],
        },
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    atomic_write(folder / "metrics.json", lambda file: file.write(text.encode()))
    for table in (*(t for task in tasks for t in task.tables.values()), operating, confusions):
        table.write(folder)
    per_image.write(folder)
    plot_precision_recall(folder / "precision_recall.png", main.result)
    plot_confusion(folder / "confusion.png", confusions)
    worst = [image for image in images if image.misses + image.false_alarms][: options.worst]
    return draw_worst(folder / "worst", dataset, checked.records, main.result, worst, main.score)


def _image_rows(dataset: DataSet, images: list[Any]) -> list[list[Any]]:
    records = in_order_of_ids(dataset)
    root = os.path.join(dataset.image_root, "")
    return [
        [
            records[image.number]["image_id"],
            str(records[image.number]["file_name"]).removeprefix(root),
            *(image.hits, image.misses, image.false_alarms),
        ]
        for image in images
    ]


def _check_free(folder: Path) -> None:
    """Make sure that no file of another program is replaced, such as the log of a training."""
    path = folder / "metrics.json"
    try:
        with path.open("rb") as file:
            if file.read(len(_START)) == _START:
                return
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    raise OutputError(
        f"{path} is in the way, and no run of instseg evaluate wrote it; choose another --output"
    )
