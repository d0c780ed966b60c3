"""Discriminative loss (De Brabandere, Neven, Van Gool, CVPRW 2017, arXiv 1708.02551)."""

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
