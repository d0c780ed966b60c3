"""Mask Scoring R-CNN (Huang et al., CVPR 2019, arXiv 1903.00241)."""

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
