"""Mask R-CNN (He et al., ICCV 2017, arXiv 1703.06870)."""

from instseg.projects import Project
from instseg.projects.mask_rcnn.matterport import (
    SamePaddingStem,
    build_matterport_resnet_fpn_backbone,
)

__all__ = ["PROJECT", "SamePaddingStem", "build_matterport_resnet_fpn_backbone"]

PROJECT = Project(
    name="mask_rcnn",
    title="Mask R-CNN",
    paper="He et al., ICCV 2017",
    family="top-down",
    best_at="the safe first choice",
    ap="59.6",
    milliseconds="77",
    weights="Detectron2, Matterport",
    order=1,
    example="mask_rcnn/mask_rcnn_shapes.yaml",
    reference="mask_rcnn/mask_rcnn_R_50_FPN_coco.yaml",
    any_score=("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    narrow=(
        *("INPUT.MIN_SIZE_TEST", 64),
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
)
