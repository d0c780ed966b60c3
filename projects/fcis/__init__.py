"""FCIS: Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017)."""

from instseg.projects import Project
from instseg.projects.fcis.backbone import CeilPoolStem, build_fcis_resnet_backbone
from instseg.projects.fcis.boxes import clip_boxes, refine_boxes, to_rois
from instseg.projects.fcis.config import add_fcis_config
from instseg.projects.fcis.fcis import FCIS
from instseg.projects.fcis.inference import Detector, paste_masks
from instseg.projects.fcis.losses import fcis_losses
from instseg.projects.fcis.regions import Detections, Maps, Regions, Samples
from instseg.projects.fcis.roi_heads import FCISROIHeads
from instseg.projects.fcis.rpn import FCISRPN, RoundedAnchorGenerator
from instseg.projects.fcis.targets import (
    assign_labels,
    every_candidate,
    hard_examples,
    mask_targets,
    random_candidates,
)

__all__ = [
    "PROJECT",
    "FCIS",
    "FCISRPN",
    "CeilPoolStem",
    "Detections",
    "Detector",
    "FCISROIHeads",
    "Maps",
    "Regions",
    "RoundedAnchorGenerator",
    "Samples",
    "add_fcis_config",
    "assign_labels",
    "build_fcis_resnet_backbone",
    "clip_boxes",
    "every_candidate",
    "fcis_losses",
    "hard_examples",
    "mask_targets",
    "paste_masks",
    "random_candidates",
    "refine_boxes",
    "to_rois",
]

PROJECT = Project(
    name="fcis",
    title="FCIS",
    paper="Li et al., CVPR 2017",
    family="top-down",
    best_at="a head without weights per region",
    ap="63.4",
    milliseconds="74",
    weights="authors'",
    order=4,
    add_config=add_fcis_config,
    example="fcis/fcis_shapes.yaml",
    reference="fcis/fcis_R_101_coco.yaml",
    any_score=("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    narrow=("INPUT.MIN_SIZE_TEST", 64),
)
