"""Discriminative loss (De Brabandere, Neven, Van Gool, CVPRW 2017, arXiv 1708.02551)."""

from instseg.projects import Project
from instseg.projects.discriminative_loss.clustering import ClusterSettings, cluster
from instseg.projects.discriminative_loss.config import add_discriminative_loss_config
from instseg.projects.discriminative_loss.discriminative_loss import (
    DiscriminativeLoss,
    add_positions,
)
from instseg.projects.discriminative_loss.enet import ENet, MultiBranchENet
from instseg.projects.discriminative_loss.losses import (
    DiscriminativeSettings,
    Terms,
    count_loss,
    discriminative_loss,
)
from instseg.projects.discriminative_loss.networks import BackboneNetwork, Maps
from instseg.projects.discriminative_loss.recurrent import (
    ReSeg,
    StackedRecurrentHourglass,
    with_coordinates,
)

__all__ = [
    "PROJECT",
    "BackboneNetwork",
    "ClusterSettings",
    "DiscriminativeLoss",
    "DiscriminativeSettings",
    "ENet",
    "Maps",
    "MultiBranchENet",
    "ReSeg",
    "StackedRecurrentHourglass",
    "Terms",
    "add_discriminative_loss_config",
    "add_positions",
    "cluster",
    "count_loss",
    "discriminative_loss",
    "with_coordinates",
]

PROJECT = Project(
    name="discriminative_loss",
    title="Discriminative Loss",
    paper="De Brabandere et al., CVPRW 2017",
    family="bottom-up",
    best_at="many similar instances, such as leaves and cells",
    ap="70.8",
    milliseconds="56",
    weights="public code's",
    order=8,
    add_config=add_discriminative_loss_config,
    example="discriminative_loss/discriminative_loss_shapes.yaml",
    reference="discriminative_loss/discriminative_loss_cityscapes.yaml",
    narrow=(
        *("MODEL.DISCRIMINATIVE_LOSS.MIN_PIXELS_TEST", 1),
        *("INPUT.MIN_SIZE_TEST", 64),
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
)
