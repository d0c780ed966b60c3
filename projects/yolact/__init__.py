"""YOLACT (Bolya et al., ICCV 2019, arXiv 1904.02689)."""

from instseg.modeling import cross_class_nms, fast_nms
from instseg.ops.assemble_masks import assemble_masks, crop, mask_probabilities
from instseg.projects import Project
from instseg.projects.yolact.authors import authors_predictor
from instseg.projects.yolact.boxes import decode, encode, level_sizes, make_priors, to_corners
from instseg.projects.yolact.config import add_yolact_config
from instseg.projects.yolact.darknet import DarkNet, build_darknet_backbone
from instseg.projects.yolact.layers import (
    FeaturePyramid,
    HeadByLevel,
    PredictionHead,
    ProtoNet,
    conv,
    resized,
)
from instseg.projects.yolact.losses import (
    GroundTruth,
    LossSettings,
    MaskSamples,
    Predictions,
    ground_truth_of,
    hardest_background,
    mask_bce,
    semantic_loss,
    yolact_losses,
)
from instseg.projects.yolact.targets import match
from instseg.projects.yolact.yolact import YOLACT, Detections, DetectionSettings

__all__ = [
    "PROJECT",
    "YOLACT",
    "DarkNet",
    "DetectionSettings",
    "Detections",
    "FeaturePyramid",
    "GroundTruth",
    "HeadByLevel",
    "LossSettings",
    "MaskSamples",
    "PredictionHead",
    "Predictions",
    "ProtoNet",
    "add_yolact_config",
    "assemble_masks",
    "build_darknet_backbone",
    "conv",
    "crop",
    "cross_class_nms",
    "decode",
    "encode",
    "fast_nms",
    "ground_truth_of",
    "hardest_background",
    "level_sizes",
    "make_priors",
    "mask_bce",
    "mask_probabilities",
    "match",
    "resized",
    "semantic_loss",
    "to_corners",
    "yolact_losses",
]

PROJECT = Project(
    name="yolact",
    title="YOLACT",
    paper="Bolya et al., ICCV 2019",
    family="top-down",
    best_at="speed on images",
    ap="35.3",
    milliseconds="27",
    weights="authors'",
    order=5,
    add_config=add_yolact_config,
    example="yolact/yolact_shapes.yaml",
    reference="yolact/yolact_resnet50.yaml",
    any_score=("MODEL.YOLACT.SCORE_THRESH_TEST", 0.0),
    narrow=(
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
    authors=authors_predictor,
)
