"""Mask Scoring R-CNN (Huang et al., CVPR 2019, arXiv 1903.00241)."""

from instseg.projects import Project
from instseg.projects.mask_scoring_rcnn.config import add_mask_scoring_rcnn_config
from instseg.projects.mask_scoring_rcnn.mask_scoring_rcnn import (
    ROI_MASKIOU_HEAD_REGISTRY,
    MaskIoUHead,
    MaskScoringROIHeads,
    build_maskiou_head,
    maskiou_loss,
    rescore,
    select_masks,
)
from instseg.projects.mask_scoring_rcnn.targets import maskiou_targets, visible_ratios

__all__ = [
    "PROJECT",
    "ROI_MASKIOU_HEAD_REGISTRY",
    "MaskIoUHead",
    "MaskScoringROIHeads",
    "add_mask_scoring_rcnn_config",
    "build_maskiou_head",
    "maskiou_loss",
    "maskiou_targets",
    "rescore",
    "select_masks",
    "visible_ratios",
]

PROJECT = Project(
    name="mask_scoring_rcnn",
    title="Mask Scoring R-CNN",
    paper="Huang et al., CVPR 2019",
    family="top-down",
    best_at="ranking by the quality of the mask",
    ap="60.5",
    milliseconds="85",
    weights="authors'",
    order=2,
    add_config=add_mask_scoring_rcnn_config,
    example="mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml",
    reference="mask_scoring_rcnn/mask_scoring_rcnn_R_50_FPN_coco.yaml",
    any_score=("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    narrow=(
        *("INPUT.MIN_SIZE_TEST", 64),
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
)
