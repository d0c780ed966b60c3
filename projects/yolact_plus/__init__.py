"""YOLACT++ (Bolya et al., TPAMI 2020, arXiv 1912.06218)."""

from instseg.projects import Project
from instseg.projects.yolact_plus.config import add_yolact_plus_config
from instseg.projects.yolact_plus.deformable import (
    DeformableConv2d,
    build_deformable_resnet_backbone,
    deformable_blocks,
)
from instseg.projects.yolact_plus.yolact_plus import FastMaskIoUNet, YOLACTPlus, mask_ious

__all__ = [
    "PROJECT",
    "DeformableConv2d",
    "FastMaskIoUNet",
    "YOLACTPlus",
    "add_yolact_plus_config",
    "build_deformable_resnet_backbone",
    "deformable_blocks",
    "mask_ious",
]

PROJECT = Project(
    name="yolact_plus",
    title="YOLACT++",
    paper="Bolya et al., TPAMI 2020",
    family="top-down",
    best_at="speed with better masks",
    ap="57.1",
    milliseconds="44",
    weights="authors'",
    order=6,
    add_config=add_yolact_plus_config,
    ancestors=("yolact",),
    example="yolact_plus/yolact_plus_shapes.yaml",
    reference="yolact_plus/yolact_plus_resnet50.yaml",
    any_score=("MODEL.YOLACT.SCORE_THRESH_TEST", 0.0),
    fast=("MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", [8, 16, 32, 64]),
    narrow=("MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", [8]),
)
