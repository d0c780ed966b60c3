"""Evaluators, chosen by data set."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from instseg.data.datasets import dataset_classes
from instseg.errors import ConfigError
from instseg.evaluation.contest import ContestEvaluator
from instseg.evaluation.mask_scores import MaskScoreCOCOEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of ``dataset_name``; its files go to ``OUTPUT_DIR/inference/DATASET``.

    Masks are ranked by ``mask_scores`` where a model gives them.  COCO's limit of 100 detections
    per image is raised to ``TEST.DETECTIONS_PER_IMAGE`` where that is more.

    Raises:
        ConfigError: a data set whose metric is not known.
    """
    dataset_classes(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type", "coco")
    if kind != "coco":
        raise ConfigError(
            f"data set {dataset_name} asks for the evaluator {kind!r}; there is only 'coco'"
        )
    if os.path.basename(metadata.get("json_file", "")) == f"{dataset_name}_coco_format.json":
        # Written by an earlier evaluator of this process for a set without a file: never reuse it.
        del metadata.json_file
    # A coco:PATH name is no file name.
    folder = os.path.join(
        cfg.OUTPUT_DIR, "inference", dataset_name.replace("/", "_").replace(":", "_")
    )
    coco = MaskScoreCOCOEvaluator(
        dataset_name,
        output_dir=folder,
        max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
        allow_cached_coco=False,
    )
    if not cfg.TEST.CONTEST_METRIC:
        return coco
    contest = ContestEvaluator(dataset_name, score_threshold=cfg.TEST.CONTEST_SCORE_THRESH)
    return DatasetEvaluators([coco, contest])
