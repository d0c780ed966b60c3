"""YolactEdge (Liu et al., ICRA 2021, arXiv 2012.12259)."""

from instseg.projects.yolact_edge.config import add_yolact_edge_config
from instseg.projects.yolact_edge.flow import FeatFlowNet, Motion, Refinement, relative_flow
from instseg.projects.yolact_edge.losses import flow_loss, warp_loss
from instseg.projects.yolact_edge.mobilenet import MobileNetV2, build_mobilenet_v2_backbone
from instseg.projects.yolact_edge.yolact_edge import YolactEdge

__all__ = [
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
