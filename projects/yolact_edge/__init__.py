"""YolactEdge (Liu et al., ICRA 2021, arXiv 2012.12259)."""

from instseg.projects import Project
from instseg.projects.yolact_edge.config import add_yolact_edge_config
from instseg.projects.yolact_edge.flow import FeatFlowNet, Motion, Refinement, relative_flow
from instseg.projects.yolact_edge.losses import flow_loss, warp_loss
from instseg.projects.yolact_edge.mobilenet import MobileNetV2, build_mobilenet_v2_backbone
from instseg.projects.yolact_edge.yolact_edge import YolactEdge

__all__ = [
    "PROJECT",
    "FeatFlowNet",
    "MobileNetV2",
    "Motion",
    "Refinement",
    "YolactEdge",
    "add_yolact_edge_config",
    "build_mobilenet_v2_backbone",
    "flow_loss",
    "relative_flow",
    "warp_loss",
]

PROJECT = Project(
    name="yolact_edge",
    title="YolactEdge",
    paper="Liu et al., ICRA 2021",
    family="top-down",
    best_at="speed on videos",
    ap="48.4 (videos)",
    milliseconds="30",
    weights="authors'",
    order=7,
    add_config=add_yolact_edge_config,
    ancestors=("yolact",),
    example="yolact_edge/yolact_edge_shapes_video.yaml",
    reference="yolact_edge/yolact_edge_resnet50.yaml",
    any_score=("MODEL.YOLACT.SCORE_THRESH_TEST", 0.0),
    narrow=(
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
)
