"""InstanceFCN (Dai et al., ECCV 2016, arXiv 1603.08678)."""

from instseg.projects import Project
from instseg.projects.instance_fcn.backbone import build_stride8_resnet_backbone
from instseg.projects.instance_fcn.config import add_instance_fcn_config
from instseg.projects.instance_fcn.instance_fcn import InstanceFCN
from instseg.projects.instance_fcn.proposals import paste_windows
from instseg.projects.instance_fcn.targets import (
    WindowRule,
    mask_loss,
    mask_targets,
    match_cells,
    score_loss,
    top_left,
)

__all__ = [
    "PROJECT",
    "InstanceFCN",
    "WindowRule",
    "add_instance_fcn_config",
    "build_stride8_resnet_backbone",
    "mask_loss",
    "mask_targets",
    "match_cells",
    "paste_windows",
    "score_loss",
    "top_left",
]

PROJECT = Project(
    name="instance_fcn",
    title="InstanceFCN",
    paper="Dai et al., ECCV 2016",
    family="top-down",
    best_at="proposals of touching instances",
    ap="AR 59.9",
    milliseconds="219",
    order=3,
    add_config=add_instance_fcn_config,
    example="instance_fcn/instance_fcn_shapes.yaml",
    reference="instance_fcn/instance_fcn_VGG16_coco.yaml",
    fast=("MODEL.INSTANCE_FCN.SCALES_TEST", (48, 96)),
    narrow=(
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
)
