"""YOLACT++ (Bolya et al., TPAMI 2020, arXiv 1912.06218)."""

from instseg.projects.yolact_plus.config import add_yolact_plus_config
from instseg.projects.yolact_plus.deformable import (
    DeformableConv2d,
    build_deformable_resnet_backbone,
    deformable_blocks,
)
from instseg.projects.yolact_plus.yolact_plus import FastMaskIoUNet, YOLACTPlus, mask_ious

__all__ = [
    "DeformableConv2d",
    "FastMaskIoUNet",
    "YOLACTPlus",
    "add_yolact_plus_config",
    "build_deformable_resnet_backbone",
    "deformable_blocks",
    "mask_ious",
]
