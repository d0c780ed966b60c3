"""Mask R-CNN (He et al., ICCV 2017, arXiv 1703.06870)."""

from instseg.projects.mask_rcnn.matterport import (
    SamePaddingStem,
    build_matterport_resnet_fpn_backbone,
)

__all__ = ["SamePaddingStem", "build_matterport_resnet_fpn_backbone"]
