"""Plots of an evaluation."""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from instseg.errors import ConfigError
from instseg.evaluation.results import TaskResult
from instseg.files import atomic_write
from instseg.reports.tables import Table

_MOST_CURVES = 8
"""Classes that get a curve of their own."""
_MOST_NUMBERS = 25
"""Rows of a confusion table in which the numbers are written."""


def require_matplotlib() -> None:
    """Raise a ConfigError that says what to type if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "the plots of --output need the package matplotlib, which is not installed; type: pip "
            "install matplotlib, or leave --output out"
        )


def plot_precision_recall(path: Path, result: TaskResult) -> None:
    """Precision over recall at IoU 0.5 and 0.75 and averaged over all, and of each class.

    Args:
        path: a PNG.
        result: classes with the most instances come first where there are many.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    recalls = np.linspace(0, 1, result.precision.shape[1])
    labels = {0.5: "IoU 0.5", 0.75: "IoU 0.75", None: "mean of IoU 0.5 to 0.95"}
    for iou, style in ((0.5, "-"), (0.75, "--"), (None, ":")):
        value = result.ap(iou=iou)
        label = f"{labels[iou]}, AP {value:.1f}"
        axes.plot(recalls, result.curve(iou), style, color="black", linewidth=2, label=label)
    counts = [result.num_instances(number=number) for number in range(len(result.classes))]
    order = [number for number in np.argsort(counts)[::-1].tolist() if counts[number]]
    for number in order[:_MOST_CURVES] if len(order) > 1 else ():
        label = f"{_short(result.classes[number])} at 0.5, {result.ap(iou=0.5, number=number):.1f}"
        axes.plot(recalls, result.curve(0.5, number), linewidth=1, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    _save(figure, path)


def plot_confusion(path: Path, table: Table) -> None:
    """A table of confusions; colours are parts of the true class.

    Args:
        path: a PNG.
        table: of :func:`instseg.reports.tables.of_confusion`.
    """
    counts = np.array([[int(cell or 0) for cell in row[1:]] for row in table.rows], dtype=float)
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(3 + 0.3 * len(counts), 24)
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(parts, cmap="cividis", vmin=0, vmax=1)
    names = [_short(str(row[0])) for row in table.rows]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel="predicted", ylabel="true")
    if len(counts) <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "black" if parts[row, column] > 0.5 else "white"
                axes.text(
                    *(column, row, f"{count:.0f}"),
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize="x-small",
                )
    figure.colorbar(image, ax=axes, fraction=0.046, label="part of the true class")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """A figure without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    atomic_write(path, lambda output: output.write(file.getvalue()))


def _short(name: str) -> str:
    """A class name that matplotlib does not take for a formula."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
