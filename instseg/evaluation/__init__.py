"""Evaluators, chosen by data set."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
)
from torch import nn

from instseg.data.datasets import (
    check_files,
    check_masks,
    dataset_classes,
    is_from_users,
    reading_datasets,
    register_dataset,
)
from instseg.data.readers.cvppp import EVALUATOR_TYPE as LEAF_EVALUATOR_TYPE
from instseg.data.readers.voc import EVALUATOR_TYPE as VOC_EVALUATOR_TYPE
from instseg.data.readers.youtube_vis import EVALUATOR_TYPE as YOUTUBE_VIS_EVALUATOR_TYPE
from instseg.data.records import check_image_ids
from instseg.errors import ConfigError
from instseg.evaluation.contest import ContestEvaluator
from instseg.evaluation.leaves import LeafEvaluator
from instseg.evaluation.mask_scores import MaskScoreCOCOEvaluator
from instseg.evaluation.proposals import ProposalEvaluator
from instseg.evaluation.semantic import SemanticEvaluator
from instseg.evaluation.tracks import TrackEvaluator
from instseg.evaluation.truth import TruthEvaluator, warn_of_limit
from instseg.evaluation.voc import VOCEvaluator, check_interpolation
from instseg.files import file_name
from instseg.modeling import gives_mask_scores

_CITYSCAPES_EVALUATOR_TYPE = "cityscapes_instance"
_KINDS = (
    "coco",
    VOC_EVALUATOR_TYPE,
    LEAF_EVALUATOR_TYPE,
    YOUTUBE_VIS_EVALUATOR_TYPE,
    _CITYSCAPES_EVALUATOR_TYPE,
)


@dataclass(frozen=True)
class _Part:
    """An evaluator of a data set.

    Attributes:
        metrics: the names of all numbers that it may give, ``TASK/METRIC``; not those that no value
            is the best of.
        build: makes it, given the folder for its files.
    """

    metrics: list[str]
    build: Callable[[str], DatasetEvaluator]


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
    """The evaluator of ``dataset_name``; its files go to ``OUTPUT_DIR/FOLDER/DATASET``.

    That is COCO's AP, or average recall under ``TEST.PROPOSALS``, and the further metrics which the
    configuration or the data set asks for.  Masks are ranked by ``mask_scores`` where a model gives
    them.  COCO's limit of 100 detections per image is raised to ``TEST.DETECTIONS_PER_IMAGE`` where
    that is more.

    ``DATASET`` is the name of the data set, shortened by :func:`instseg.files.file_name` where it
    holds a path.

    Raises:
        ConfigError: a data set whose metric is not known, or a metric that needs classes for a
            model without.
        DatasetError: a data set that cannot be read.
    """
    register_dataset(dataset_name)
    parts = _parts(cfg, dataset_name)
    if is_from_users(dataset_name):
        _check_truth(cfg, dataset_name, DatasetCatalog.get(dataset_name))
    place = os.path.join(cfg.OUTPUT_DIR, folder, file_name(dataset_name))
    evaluators = [part.build(place) for part in parts]
    for evaluator in evaluators:
        if isinstance(evaluator, TruthEvaluator):
            evaluator.warn_of_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluation(cfg: CfgNode) -> None:
    """Find before training what would stop the evaluation after it.

    Raises:
        ConfigError, DatasetError: objects without a mask, pictures without a file, a metric that
            the data set has nothing for, or see :func:`build_evaluator`.
    """
    for name in cfg.DATASETS.TEST:
        _parts(cfg, name)
        with reading_datasets([name]):
            if is_from_users(name):
                records = DatasetCatalog.get(name)
                _check_truth(cfg, name, records)
                check_files(name, records)
                crowds = [
                    (record["image_id"], bool(entry.get("iscrowd", 0)))
                    for record in records
                    for entry in record.get("annotations", ())
                ]
                warn_of_limit(name, crowds, cfg.TEST.DETECTIONS_PER_IMAGE)
            if _has_tracks(cfg, name):
                _track_evaluator(cfg, name, "")


def _check_truth(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> None:
    check_image_ids(name, records)
    if cfg.MODEL.MASK_ON:
        check_masks(name, records)


def metric_names(cfg: CfgNode, model: nn.Module) -> list[str]:
    """What an evaluation of ``model`` on ``DATASETS.TEST`` measures, as the event storage calls it.

    That is ``TASK/METRIC``, as ``segm/AP`` and ``segm/AP-person``, and of several data sets
    ``DATASET/TASK/METRIC``, with their names as in ``DATASETS.TEST``.  Under ``TEST.AUG.ENABLED``
    there is a ``TASK_TTA`` for each task.

    Args:
        model: the one to be evaluated.
    Raises:
        ConfigError, DatasetError: see :func:`build_evaluator`.
    """
    scored = gives_mask_scores(model)
    names = []
    for dataset in cfg.DATASETS.TEST:
        prefix = f"{dataset}/" if len(cfg.DATASETS.TEST) > 1 else ""
        for part in _parts(cfg, dataset, mask_scores=scored):
            names += [prefix + metric for metric in part.metrics]
            if cfg.TEST.AUG.ENABLED:
                split = [metric.partition("/") for metric in part.metrics]
                names += [f"{prefix}{task}_TTA/{metric}" for task, _, metric in split]
    return names


def lower_is_better(metric: str) -> bool:
    """Whether the lowest value of a metric is the best."""
    return metric.endswith("leaves/|DiC|")


def _parts(cfg: CfgNode, name: str, mask_scores: bool = False) -> list[_Part]:
    """Evaluators that ``cfg`` or the data set ``name`` ask for."""
    classes = dataset_classes(name)
    kind = _kind(cfg, name)
    if kind == _CITYSCAPES_EVALUATOR_TYPE:
        return [_Part(["segm/AP", "segm/AP50"], lambda _: CityscapesInstanceEvaluator(name))]
    threshold = cfg.TEST.CONTEST_SCORE_THRESH
    parts = [_first_part(cfg, name, classes, mask_scores)]
    if cfg.TEST.CONTEST_METRIC:
        parts.append(
            _Part(
                ContestEvaluator.metrics(),
                lambda _: ContestEvaluator(name, score_threshold=threshold),
            )
        )
    if cfg.TEST.VOC_METRIC or (kind == VOC_EVALUATOR_TYPE and not cfg.TEST.PROPOSALS):
        interpolation = cfg.TEST.VOC_INTERPOLATION
        check_interpolation(interpolation)
        parts.append(
            _Part(
                VOCEvaluator.metrics(classes),
                lambda _: VOCEvaluator(name, interpolation=interpolation),
            )
        )
    if _has_tracks(cfg, name):
        parts.append(
            _Part(TrackEvaluator.metrics(), lambda folder: _track_evaluator(cfg, name, folder))
        )
    if cfg.TEST.LEAF_METRIC or kind == LEAF_EVALUATOR_TYPE:
        parts.append(
            _Part(LeafEvaluator.metrics(), lambda _: LeafEvaluator(name, score_threshold=threshold))
        )
    if cfg.TEST.SEMANTIC_METRIC:
        parts.append(_Part(SemanticEvaluator.metrics(classes), lambda _: SemanticEvaluator(name)))
    return parts


def _kind(cfg: CfgNode, name: str) -> str:
    """The evaluator that the data set ``name`` asks for, if ``cfg`` can give it."""
    kind: str = MetadataCatalog.get(name).get("evaluator_type", "coco")
    if kind not in _KINDS:
        raise ConfigError(
            f"data set {name} asks for the evaluator {kind!r}; there are only "
            f"{', '.join(map(repr, _KINDS))}"
        )
    if cfg.TEST.PROPOSALS and cfg.TEST.VOC_METRIC:
        raise ConfigError(
            "TEST.PROPOSALS is for models without classes, TEST.VOC_METRIC needs classes; set one "
            "of them to False"
        )
    if kind == _CITYSCAPES_EVALUATOR_TYPE and importlib.util.find_spec("cityscapesscripts") is None:
        raise ConfigError(
            f"data set {name} needs the package cityscapesscripts; pip install cityscapesscripts"
        )
    return kind


def _first_part(cfg: CfgNode, name: str, classes: list[str], mask_scores: bool) -> _Part:
    """COCO's AP, or average recall."""

    def coco(folder: str) -> DatasetEvaluator:
        return MaskScoreCOCOEvaluator(
            name,
            output_dir=folder,
            max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
        )

    if cfg.TEST.PROPOSALS:
        return _Part(ProposalEvaluator.metrics(), lambda _: ProposalEvaluator(name))
    metrics = MaskScoreCOCOEvaluator.metrics(
        classes,
        masks=cfg.MODEL.MASK_ON,
        mask_scores=mask_scores,
        keypoints=cfg.MODEL.KEYPOINT_ON,
    )
    return _Part(metrics, coco)


def _has_tracks(cfg: CfgNode, dataset_name: str) -> bool:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "")
    return bool(cfg.TEST.TRACK_METRIC) or kind == YOUTUBE_VIS_EVALUATOR_TYPE


def _track_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> TrackEvaluator:
    threshold = cfg.TEST.TRACK_SCORE_THRESH
    return TrackEvaluator(dataset_name, output_dir=folder, score_threshold=threshold)
