"""Measure shipped models: on a whole test set, and on its first images, which tests repeat."""

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from instseg.benchmark.rows import seconds
from instseg.config.nodes import load_cfg
from instseg.data.dataset import DataSet, load
from instseg.data.images import read_image
from instseg.data.intensity import ModelImage
from instseg.evaluation import build_evaluator, take_cropped
from instseg.inference.predictor import Predictor
from instseg.modeling import CROPPED
from instseg.training.trainer import Trainer

KEPT = (
    *("contest/AP50", "contest/AP75", "contest/AP"),
    *("segm/AP", "segm/AP50", "segm/AP75", "segm/rho", "segm/rho_by_score", "bbox/AP"),
    *("proposals_segm/AR@10", "proposals_segm/AR@100", "proposals_segm/AR@1000"),
)
"""Names of the numbers that the manifest keeps, if an evaluation gives them."""
CHECK_IMAGES = 10
"""Images of the numbers that tests repeat."""


def evaluate_shipped(address: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """What ``train_net.py --config-file zoo://NAME --eval-only`` measures, as far as in ``KEPT``.

    Args:
        address: ``zoo://NAME``.
        overrides: ``[KEY, VALUE, ...]``.
    Raises:
        InstsegError: the model or its test set cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_cfg(address, ["OUTPUT_DIR", folder, *overrides])
        return _kept(Trainer.test(cfg, Predictor(cfg).model))


def check_shipped(address: str, count: int = CHECK_IMAGES) -> dict[str, float]:
    """The same on the first images of the test set, and ``ms``, the median time of an image there.

    Args:
        address: ``zoo://NAME``.
        count: of the images.
    Raises:
        InstsegError: the model or its test set cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_cfg(address, ["OUTPUT_DIR", folder])
        dataset = _first(load(cfg.DATASETS.TEST[0]), count)
        masks = CROPPED if take_cropped(cfg, [dataset]) else None
        predictor = Predictor(cfg, masks=masks)
        evaluator = build_evaluator(cfg, dataset)
        evaluator.reset()
        times: list[float] = []
        for record in dataset.records:
            image = ModelImage(read_image(record["file_name"], intensity=predictor.intensity))
            if not times:
                predictor([image])  # the first image of a process takes longer
            results: list[Any] = []
            times.append(seconds(lambda: results.extend(predictor([image]))))  # noqa: B023
            evaluator.process([record], results)
        measured = _kept(evaluator.evaluate() or {})
    return {**measured, "ms": 1000 * statistics.median(times)}


def _first(dataset: DataSet, count: int) -> DataSet:
    """A data set of the first images of another one, ground truth included."""
    return replace(dataset, records=dataset.records[:count], _gt_file=None)


def _kept(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers in ``KEPT`` of what an evaluation gave, as ``TASK/METRIC``, rounded.

    Those that cannot be measured, such as a correlation without a detection, are left out.
    """
    named = {f"{task}/{name}": x for task, values in results.items() for name, x in values.items()}
    measured = {name: float(named[name]) for name in KEPT if name in named}
    return {name: round(value, 3) for name, value in measured.items() if math.isfinite(value)}
