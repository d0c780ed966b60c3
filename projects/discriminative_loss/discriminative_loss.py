"""The meta-architecture: dense maps, losses on them, instances from them."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.data.images import check_colour
from instseg.errors import ConfigError
from instseg.modeling import (
    DenseInstances,
    DenseModel,
    check_finite,
    dice_loss,
    resized_index,
    semantic_loss,
    stage,
)
from instseg.projects.discriminative_loss.clustering import ClusterSettings, cluster
from instseg.projects.discriminative_loss.enet import ENet
from instseg.projects.discriminative_loss.losses import (
    DiscriminativeSettings,
    count_loss,
    discriminative_loss,
)
from instseg.projects.discriminative_loss.networks import BackboneNetwork, EmbeddingNetwork, Maps
from instseg.projects.discriminative_loss.recurrent import ReSeg, StackedRecurrentHourglass

TERMS = ("variance", "distance", "regulariser", "semantic", "dice", "count")
"""Losses, each with a weight ``MODEL.DISCRIMINATIVE_LOSS.<TERM>_WEIGHT``."""


@META_ARCH_REGISTRY.register()
class DiscriminativeLoss(DenseModel):
    """Semantic instance segmentation with a discriminative loss (De Brabandere, Neven, Van Gool,
    CVPRW 2017, arXiv 1708.02551).

    Every pixel gets an embedding.  Training pulls the embeddings of one instance together and
    pushes the means of a class's instances apart.  The same network predicts a semantic map;
    instances are the clusters among the pixels of each class of it.

    ::

        image (B, 3, H, W) → network → semantic logits (B, C + 1, h, w), embedding (B, D, h, w)
          → resized to OUTPUT_STRIDE (→ + position of each pixel)
          training: losses; else: clustering of each class → masks
    """

    num_classes_key = "MODEL.DISCRIMINATIVE_LOSS.NUM_CLASSES"
    semantic_key = "MODEL.DISCRIMINATIVE_LOSS.SEMANTIC_TEST"

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        output_stride: int,
        position_scale: float,
        loss_settings: DiscriminativeSettings,
        weights: dict[str, float],
        max_count: int,
        cluster_settings: ClusterSettings,
        give_semantic: bool,
    ) -> None:
        """
        Args:
            network: see :class:`EmbeddingNetwork`.
            pixel_mean, pixel_std: see :class:`~instseg.modeling.PixelModel`.
            output_stride, give_semantic: see :class:`~instseg.modeling.DenseModel`.
            position_scale: pixels per unit of the position added to the first two dimensions of the
                embedding; 0 adds nothing.
            loss_settings: settings of the discriminative loss.
            weights: weights of all losses, by ``TERMS``.
            max_count: number of instances that the network's count expresses as 1.
            cluster_settings: how instances are found.
        """
        super().__init__(
            pixel_mean, pixel_std, output_stride=output_stride, give_semantic=give_semantic
        )
        self.network = network
        self.position_scale = position_scale
        self.loss_settings = loss_settings
        self.weights = weights
        self.max_count = max_count
        self.cluster_settings = cluster_settings

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DISCRIMINATIVE_LOSS
        return {
            "network": build_network(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "output_stride": node.OUTPUT_STRIDE,
            "position_scale": node.POSITION_SCALE,
            "loss_settings": DiscriminativeSettings(
                delta_var=node.DELTA_VAR,
                delta_dist=node.DELTA_DIST,
                norm=node.NORM_TYPE,
                variance=node.VARIANCE_MEAN,
            ),
            "weights": {term: node[f"{term.upper()}_WEIGHT"] for term in TERMS},
            "max_count": node.MAX_COUNT,
            "cluster_settings": ClusterSettings(
                method=node.CLUSTERING,
                bandwidth=node.BANDWIDTH_TEST or node.DELTA_DIST,
                min_pixels=node.MIN_PIXELS_TEST,
                max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            ),
            "give_semantic": node.SEMANTIC_TEST,
        }

    def maps(self, images: Sequence[Tensor]) -> Maps:
        """Run the network.

        Args:
            images: (3, h, w) each, normalised; padded with 0 at their right and bottom.
        Returns:
            maps of the padded batch at ``output_stride``, positions added, in single precision.
        """
        network: EmbeddingNetwork = self.network  # type: ignore[assignment]
        batch = self.padded(images, network.size_divisibility, network.min_size)
        semantic, embeddings, counts = network(batch)
        semantic, embeddings = (self.resized(x, batch) for x in (semantic, embeddings))
        if self.position_scale:
            embeddings = add_positions(embeddings, self.output_stride / self.position_scale)
        return Maps(semantic, embeddings, None if counts is None else counts.float())

    def losses(
        self, images: Sequence[Tensor], batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """All losses of a batch, weighted."""
        semantic, embeddings, counts = self.maps(images)
        targets = self.targets(semantic, batched_inputs)
        # Sums over many pixels need single precision.
        with torch.autocast(self.device.type, enabled=False):
            terms = discriminative_loss(embeddings, targets, self.loss_settings)
            losses = {
                "variance": terms.variance,
                "distance": terms.distance,
                "regulariser": terms.regulariser,
                "semantic": semantic_loss(semantic, targets.semantic),
            }
            if self.weights["dice"]:
                losses["dice"] = dice_loss(semantic, targets.semantic)
            if counts is not None:
                losses["count"] = count_loss(counts, targets, self.max_count)
        return {f"loss_{name}": loss * self.weights[name] for name, loss in losses.items()}

    def find(self, image: Tensor, item: dict[str, Any]) -> tuple[DenseInstances, Tensor]:
        """Instances of one image, and its (C + 1, h, w) semantic probabilities.

        Args:
            image: (3, h', w') normalised.
            item: see :meth:`forward`.  Labels ``given_semantic`` (H, W) int replace the predicted
                semantic map (0 background, class + 1; resized to the image); ``num_instances`` is
                for k-means.  Detectron2's ``sem_seg`` is the ground truth and is not used.
        Raises:
            CheckpointError: the network gives values that are not finite.
            ValueError: ``given_semantic`` is no map of such labels.
        """
        with stage("network"):
            logits, embeddings, counts = self.maps([image])
        # Cut off the padding.
        height, width = self.cells(image)
        probabilities = logits[0, :, :height, :width].softmax(dim=0)
        embeddings = embeddings[0, :, :height, :width]
        check_finite(probabilities, embeddings, *(() if counts is None else (counts,)))
        if "given_semantic" in item:
            probabilities = self._given(item["given_semantic"], probabilities)
        number = item.get("num_instances")
        if number is None and counts is not None:
            number = round(float(counts[0]) * self.max_count)
        if number is None and self.cluster_settings.method == "k_means":
            raise ConfigError(
                "MODEL.DISCRIMINATIVE_LOSS.CLUSTERING k_means needs the number of instances, which "
                "this network does not predict; give it as num_instances of each input, set "
                "NETWORK reseg or hourglass, or CLUSTERING mean_shift"
            )
        with stage("clustering"):
            clusters = cluster(embeddings, probabilities, self.cluster_settings, number)
        return clusters, probabilities

    def _given(self, labels: Tensor, like: Tensor) -> Tensor:
        """Labels (H, W) of an image → probabilities 0 and 1 of the shape of ``like``."""
        if labels.dim() != 2 or not labels.numel() or labels.is_floating_point():
            raise ValueError(
                f"given_semantic has shape {tuple(labels.shape)} and type {labels.dtype}; expected "
                "(H, W) whole numbers"
            )
        labels = labels.to(self.device, torch.int64)
        least, greatest = (int(x) for x in labels.aminmax())
        if least < 0 or greatest >= len(like):
            raise ValueError(
                f"given_semantic has labels from {least} to {greatest}; expected 0 for background "
                f"and 1 to {len(like) - 1} for the classes"
            )
        rows = resized_index(labels.shape[0], like.shape[1], 1, self.device)
        columns = resized_index(labels.shape[1], like.shape[2], 1, self.device)
        nearest = labels[rows][:, columns]
        return F.one_hot(nearest, like.shape[0]).movedim(-1, 0).to(like.dtype)


def add_positions(embeddings: Tensor, step: float) -> Tensor:
    """Add ``step`` per column to the first dimension and ``step`` per row to the second.

    Args:
        embeddings: (B, D, h, w), D at least 2.
    """
    _, dimensions, height, width = embeddings.shape
    grid = embeddings.new_zeros(dimensions, height, width)
    grid[0] = torch.arange(width, device=grid.device) * step
    grid[1] = (torch.arange(height, device=grid.device) * step)[:, None]
    return embeddings + grid


def build_network(cfg: CfgNode) -> nn.Module:
    """The network ``MODEL.DISCRIMINATIVE_LOSS.NETWORK``."""
    node = cfg.MODEL.DISCRIMINATIVE_LOSS
    sizes = (node.NUM_CLASSES, node.EMBEDDING_DIM)
    if node.NETWORK != "backbone":
        check_colour(cfg, f"MODEL.DISCRIMINATIVE_LOSS.NETWORK {node.NETWORK}")
    if node.NETWORK == "enet":
        return ENet(*sizes, norm=node.NORM)
    if node.NETWORK == "reseg":
        return ReSeg(*sizes, coordinates=node.COORDINATES)
    if node.NETWORK == "hourglass":
        return StackedRecurrentHourglass(*sizes, coordinates=node.COORDINATES)
    return BackboneNetwork(
        backbone=build_backbone(cfg),
        num_classes=node.NUM_CLASSES,
        embedding_dim=node.EMBEDDING_DIM,
        channels=node.CHANNELS,
        detail_channels=node.DETAIL_CHANNELS,
        norm=node.NORM,
        in_channels=len(cfg.MODEL.PIXEL_MEAN),
    )
