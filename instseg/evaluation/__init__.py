"""Choose, check and build the metrics that a configuration and its data sets ask for."""

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
from instseg.evaluation.ground_truth import GroundTruthEvaluator, warn_of_limit
from instseg.evaluation.registry import metrics_of
from instseg.files import file_name


def build_evaluator(cfg: CfgNode, dataset: DataSet, folder: str = "inference") -> DatasetEvaluator:
    """The evaluator of ``dataset``; its files go to ``OUTPUT_DIR/FOLDER/DATASET``.

    It computes the metrics that ``TEST.METRICS`` names and those that the data set asks for.  It
    ranks masks by ``mask_scores`` if a model gives them.  COCO's limit of 100 detections per image
    rises to ``TEST.DETECTIONS_PER_IMAGE`` if that is more.

    ``DATASET`` is the name of the data set; :func:`instseg.files.file_name` shortens names with
    paths.

    Raises:
        ConfigError: the data set's metric is unknown, or a metric needs classes and the model has
            none.
        DatasetError: the ground truth of the data set cannot be used.
    """
    metrics = metrics_of(cfg, dataset)
    if dataset.is_from_users:
        _check_ground_truth(cfg, dataset)
    output_dir = os.path.join(cfg.OUTPUT_DIR, folder, file_name(dataset.name))
    evaluators = [metric.from_config(cfg, dataset, output_dir) for metric in metrics]
    for evaluator in evaluators:
        if isinstance(evaluator, GroundTruthEvaluator):
            evaluator.warn_of_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def take_cropped(cfg: CfgNode, datasets: Sequence[DataSet]) -> bool:
    """Whether all metrics of an evaluation read :class:`instseg.masks.CroppedMasks`.

    Args:
        datasets: those of ``DATASETS.TEST``.
    """
    return all(metric.takes_cropped for dataset in datasets for metric in metrics_of(cfg, dataset))


def check_evaluation(cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet]) -> None:
    """Find before training the problems that would stop the evaluation after it.

    Raises:
        ConfigError, DatasetError: instances have no mask, images have no file, the model or the
            data set does not support a metric, or see :func:`build_evaluator`.
    """
    for dataset in datasets:
        metrics = metrics_of(cfg, dataset)
        if dataset.is_from_users:
            _check_ground_truth(cfg, dataset)
            check_files(dataset.name, dataset.records)
            crowds = [
                (record["image_id"], bool(entry.get("iscrowd", 0)))
                for record in dataset.records
                for entry in record.get("annotations", ())
            ]
            warn_of_limit(dataset.name, crowds, cfg.TEST.DETECTIONS_PER_IMAGE)
        for metric in metrics:
            metric.check(cfg, dataset, model)


def _check_ground_truth(cfg: CfgNode, dataset: DataSet) -> None:
    check_image_ids(dataset.name, dataset.records)
    if cfg.MODEL.MASK_ON:
        check_masks(dataset.name, dataset.records)


def metric_names(cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet]) -> list[str]:
    """Names in the event storage of everything that an evaluation of ``model`` measures.

    A name is ``TASK/METRIC``, such as ``segm/AP`` and ``segm/AP-person``.  With several data sets
    it is ``DATASET/TASK/METRIC``, with names as in ``DATASETS.TEST``.  ``TEST.AUG.ENABLED`` adds a
    ``TASK_TTA`` for each task.

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
