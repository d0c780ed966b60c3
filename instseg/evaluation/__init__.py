"""Evaluators, chosen by data set."""

import importlib.util
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
)

from instseg.data.cvppp import EVALUATOR_TYPE as LEAF_EVALUATOR_TYPE
from instseg.data.datasets import check_files, check_masks, dataset_classes, reading_datasets
from instseg.data.voc import EVALUATOR_TYPE as VOC_EVALUATOR_TYPE
from instseg.data.youtube_vis import EVALUATOR_TYPE as YOUTUBE_VIS_EVALUATOR_TYPE
from instseg.errors import ConfigError
from instseg.evaluation.contest import ContestEvaluator
from instseg.evaluation.leaves import LeafEvaluator
from instseg.evaluation.mask_scores import MaskScoreCOCOEvaluator
from instseg.evaluation.proposals import ProposalEvaluator
from instseg.evaluation.semantic import SemanticEvaluator
from instseg.evaluation.tracks import TrackEvaluator
from instseg.evaluation.voc import VOCEvaluator

_CITYSCAPES_EVALUATOR_TYPE = "cityscapes_instance"
_KINDS = (
    "coco",
    VOC_EVALUATOR_TYPE,
    LEAF_EVALUATOR_TYPE,
    YOUTUBE_VIS_EVALUATOR_TYPE,
    _CITYSCAPES_EVALUATOR_TYPE,
)


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of ``dataset_name``; its files go to ``OUTPUT_DIR/inference/DATASET``.

    That is COCO's AP, or average recall under ``TEST.PROPOSALS``, and the further metrics which the
    configuration or the data set asks for.  Masks are ranked by ``mask_scores`` where a model gives
    them.  COCO's limit of 100 detections per image is raised to ``TEST.DETECTIONS_PER_IMAGE`` where
    that is more.

    Raises:
        ConfigError: a data set whose metric is not known, or a metric that needs classes for a
            model without.
        DatasetError: a data set that cannot be read.
    """
    dataset_classes(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type", "coco")
    if kind not in _KINDS:
        raise ConfigError(
            f"data set {dataset_name} asks for the evaluator {kind!r}; there are only "
            f"{', '.join(map(repr, _KINDS))}"
        )
    if cfg.TEST.PROPOSALS and cfg.TEST.VOC_METRIC:
        raise ConfigError(
            "TEST.PROPOSALS is for models without classes, TEST.VOC_METRIC needs classes; set one "
            "of them to False"
        )
    if kind == _CITYSCAPES_EVALUATOR_TYPE:
        return _cityscapes(dataset_name)
    if os.path.basename(metadata.get("json_file", "")) == f"{dataset_name}_coco_format.json":
        # Written by an earlier evaluator of this process for a set without a file: never reuse it.
        del metadata.json_file
    if cfg.MODEL.MASK_ON and MetadataCatalog.get(dataset_name).get("json_file"):
        check_masks(dataset_name, DatasetCatalog.get(dataset_name))
    # A coco:PATH name is no file name.
    folder = os.path.join(
        cfg.OUTPUT_DIR, "inference", dataset_name.replace("/", "_").replace(":", "_")
    )
    evaluators: list[DatasetEvaluator] = []
    if cfg.TEST.PROPOSALS:
        evaluators.append(ProposalEvaluator(dataset_name, output_dir=folder))
    else:
        coco = MaskScoreCOCOEvaluator(
            dataset_name,
            output_dir=folder,
            max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
            allow_cached_coco=False,
        )
        evaluators.append(coco)
    if cfg.TEST.CONTEST_METRIC:
        threshold = cfg.TEST.CONTEST_SCORE_THRESH
        evaluators.append(ContestEvaluator(dataset_name, score_threshold=threshold))
    if cfg.TEST.VOC_METRIC or (kind == VOC_EVALUATOR_TYPE and not cfg.TEST.PROPOSALS):
        interpolation = cfg.TEST.VOC_INTERPOLATION
        evaluators.append(VOCEvaluator(dataset_name, interpolation=interpolation))
    if _has_tracks(cfg, dataset_name):
        evaluators.append(_track_evaluator(cfg, dataset_name, folder))
    if cfg.TEST.LEAF_METRIC or kind == LEAF_EVALUATOR_TYPE:
        threshold = cfg.TEST.CONTEST_SCORE_THRESH
        evaluators.append(LeafEvaluator(dataset_name, score_threshold=threshold))
    if cfg.TEST.SEMANTIC_METRIC:
        evaluators.append(SemanticEvaluator(dataset_name))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluation(cfg: CfgNode) -> None:
    """Find before training what would stop the evaluation after it.

    Raises:
        ConfigError, DatasetError: objects without a mask, pictures without a file, or see
            :class:`~instseg.evaluation.tracks.TrackEvaluator`.
    """
    for name in cfg.DATASETS.TEST:
        with reading_datasets([name]):
            if MetadataCatalog.get(name).get("json_file"):
                records = DatasetCatalog.get(name)
                if cfg.MODEL.MASK_ON:
                    check_masks(name, records)
                check_files(name, records)
            if _has_tracks(cfg, name):
                _track_evaluator(cfg, name, "")


def _has_tracks(cfg: CfgNode, dataset_name: str) -> bool:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "")
    return bool(cfg.TEST.TRACK_METRIC) or kind == YOUTUBE_VIS_EVALUATOR_TYPE


def _track_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> TrackEvaluator:
    threshold = cfg.TEST.TRACK_SCORE_THRESH
    return TrackEvaluator(dataset_name, output_dir=folder, score_threshold=threshold)


def _cityscapes(dataset_name: str) -> DatasetEvaluator:
    """Detectron2's evaluator of Cityscapes, which runs the data set's own scripts."""
    if importlib.util.find_spec("cityscapesscripts") is None:
        raise ConfigError(
            f"data set {dataset_name} needs the package cityscapesscripts; pip install "
            "cityscapesscripts"
        )
    return CityscapesInstanceEvaluator(dataset_name)
