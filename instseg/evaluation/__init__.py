"""Evaluations: which metrics a configuration and its data sets ask for, checked and built."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from torch import nn

from instseg.data.build import check_files, check_masks
from instseg.data.dataset import DataSet
from instseg.data.records import check_image_ids
from instseg.evaluation import (  # noqa: F401  (importing a metric registers it)
    cityscapes,
    contest,
    leaves,
    mask_scores,
    proposals,
    semantic,
    tracks,
    voc,
)
from instseg.evaluation.registry import metrics_of
from instseg.evaluation.truth import TruthEvaluator, warn_of_limit
from instseg.files import file_name


def build_evaluator(cfg: CfgNode, dataset: DataSet, folder: str = "inference") -> DatasetEvaluator:
    """The evaluator of ``dataset``; its files go to ``OUTPUT_DIR/FOLDER/DATASET``.

    It has the metrics that ``TEST.METRICS`` names and those that the data set asks for.  Masks are
    ranked by ``mask_scores`` where a model gives them.  COCO's limit of 100 detections per image is
    raised to ``TEST.DETECTIONS_PER_IMAGE`` where that is more.

    ``DATASET`` is the name of the data set, shortened by :func:`instseg.files.file_name` where it
    holds a path.

    Raises:
        ConfigError: a data set whose metric is not known, or a metric that needs classes for a
            model without.
        DatasetError: a data set whose ground truth cannot be used.
    """
    metrics = metrics_of(cfg, dataset)
    if dataset.is_from_users:
        _check_truth(cfg, dataset)
    place = os.path.join(cfg.OUTPUT_DIR, folder, file_name(dataset.name))
    evaluators = [metric.from_config(cfg, dataset, place) for metric in metrics]
    for evaluator in evaluators:
        if isinstance(evaluator, TruthEvaluator):
            evaluator.warn_of_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluation(cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet]) -> None:
    """Find before training what would stop the evaluation on ``datasets`` after it.

    Raises:
        ConfigError, DatasetError: objects without a mask, images without a file, a metric that
            the model or the data set has nothing for, or see :func:`build_evaluator`.
    """
    for dataset in datasets:
        metrics = metrics_of(cfg, dataset)
        if dataset.is_from_users:
            _check_truth(cfg, dataset)
            check_files(dataset.name, dataset.records)
            crowds = [
                (record["image_id"], bool(entry.get("iscrowd", 0)))
                for record in dataset.records
                for entry in record.get("annotations", ())
            ]
            warn_of_limit(dataset.name, crowds, cfg.TEST.DETECTIONS_PER_IMAGE)
        for metric in metrics:
            metric.check(cfg, dataset, model)


def _check_truth(cfg: CfgNode, dataset: DataSet) -> None:
    check_image_ids(dataset.name, dataset.records)
    if cfg.MODEL.MASK_ON:
        check_masks(dataset.name, dataset.records)


def metric_names(cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet]) -> list[str]:
    """What an evaluation of ``model`` measures, as the event storage calls it.

    That is ``TASK/METRIC``, as ``segm/AP`` and ``segm/AP-person``, and of several data sets
    ``DATASET/TASK/METRIC``, with their names as in ``DATASETS.TEST``.  Under ``TEST.AUG.ENABLED``
    there is a ``TASK_TTA`` for each task.

    Args:
        model: the one to be evaluated.
        datasets: those of ``DATASETS.TEST``.
    Raises:
        ConfigError: see :func:`build_evaluator`.
    """
    names = []
    for dataset in datasets:
        prefix = f"{dataset.name}/" if len(datasets) > 1 else ""
        for metric in metrics_of(cfg, dataset):
            measured = metric.measures(cfg, dataset, model)
            names += [prefix + name for name in measured]
            if cfg.TEST.AUG.ENABLED:
                split = [name.partition("/") for name in measured]
                names += [f"{prefix}{task}_TTA/{name}" for task, _, name in split]
    return names


def lower_is_better(metric: str) -> bool:
    """Whether the lowest value of a metric is the best."""
    return metric.endswith("leaves/|DiC|")
