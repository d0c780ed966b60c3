"""The meta-architecture: three networks in sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.data.images import check_colour
from instseg.modeling import DenseModel, DenseTargets
from instseg.ops.sgn_lines import START
from instseg.projects.sgn import inference, training
from instseg.projects.sgn.config import SOURCES, STAGES
from instseg.projects.sgn.inputs import given_probabilities
from instseg.projects.sgn.lines import most_likely_labels
from instseg.projects.sgn.merging import MergeSettings
from instseg.projects.sgn.networks import BreakpointNet, LineNet, MergerNet
from instseg.projects.sgn.pipeline import GroundTruth, ImageMaps, LineSettings, breakpoint_links


@META_ARCH_REGISTRY.register()
class SGN(DenseModel):
    """After SGN: Sequential Grouping Networks (Liu, Jia, Fidler, Urtasun, ICCV 2017).

    ::

        image → BreakpointNet → semantic map, breakpoints along rows and columns
          → lines, cut by breakpoints → LineNet: links → components
          → MergerNet: pairs of components → instances

    Each network is trained on the results of those before it, without a gradient into them.
    """

    num_classes_key = "MODEL.SGN.NUM_CLASSES"
    semantic_key = "MODEL.SGN.SEMANTIC_TEST"

    @configurable
    def __init__(
        self,
        *,
        breakpoints: BreakpointNet,
        lines: LineNet,
        merger: MergerNet,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        num_classes: int,
        stages: Sequence[str],
        class_aware: bool,
        sources: dict[str, str],
        output_stride: int,
        semantic_weight: float,
        dice_weight: float,
        line_settings: LineSettings,
        merge_settings: MergeSettings,
        merge_pairs: int,
        min_area: int,
        max_instances: int,
        give_semantic: bool,
    ) -> None:
        """
        Args:
            breakpoints, lines, merger: the networks.
            pixel_mean, pixel_std: see :class:`~instseg.modeling.PixelModel`.
            num_classes: without the background.
            stages: networks to train, of ``STAGES``.
            class_aware: whether lines end where the class changes.
            sources: source of each stage's result, by the keys of ``SOURCES``.
            output_stride, give_semantic: see :class:`~instseg.modeling.DenseModel`.
            semantic_weight, dice_weight: weights of the semantic map's losses.
            line_settings, merge_settings: how components and instances are found.
            merge_pairs: training pairs of MergerNet per batch.
            min_area: least cells of an instance.
            max_instances: most instances of an image, the best ones.
        """
        super().__init__(
            pixel_mean, pixel_std, output_stride=output_stride, give_semantic=give_semantic
        )
        self.breakpoints = breakpoints
        self.lines = lines
        self.merger = merger
        self.stages = tuple(stages)
        for network in self._frozen():
            network.requires_grad_(False)
        self.num_classes = num_classes
        self.class_aware = class_aware
        self.sources = sources
        self.semantic_weight = semantic_weight
        self.dice_weight = dice_weight
        self.line_settings = line_settings
        self.merge_settings = merge_settings
        self.merge_pairs = merge_pairs
        self.min_area = min_area
        self.max_instances = max_instances

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.SGN
        check_colour(cfg, "SGN")
        return {
            "breakpoints": BreakpointNet(
                backbone=build_backbone(cfg),
                num_classes=node.NUM_CLASSES,
                channels=node.CHANNELS,
                detail_channels=node.DETAIL_CHANNELS,
                norm=node.NORM,
                head_lr_factor=node.HEAD_LR_FACTOR,
            ),
            "lines": LineNet(node.LINE_CHANNELS),
            "merger": MergerNet(),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "num_classes": node.NUM_CLASSES,
            "stages": node.STAGES,
            "class_aware": node.CLASS_AWARE,
            "sources": {key: node[key] for key in SOURCES},
            "output_stride": node.OUTPUT_STRIDE,
            "semantic_weight": node.SEMANTIC_WEIGHT,
            "dice_weight": node.DICE_WEIGHT,
            "line_settings": LineSettings(
                widening=node.WIDENING,
                breakpoint_threshold=node.BREAKPOINT_THRESH_TEST,
                link_threshold=node.LINK_THRESH_TEST,
                direction=node.LINES,
            ),
            "merge_settings": MergeSettings(
                min_area=node.MERGE_MIN_AREA,
                max_components=node.MERGE_MAX_COMPONENTS,
                max_gap=node.MERGE_MAX_GAP,
                partners=node.MERGE_PARTNERS,
                threshold=node.MERGE_THRESH_TEST,
            ),
            "merge_pairs": node.MERGE_PAIRS_TRAIN,
            "min_area": node.MIN_AREA_TEST,
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
            "give_semantic": node.SEMANTIC_TEST,
        }

    def train(self, mode: bool = True) -> "SGN":
        """Networks that are not trained keep their running statistics too."""
        super().train(mode)
        for network in self._frozen():
            network.eval()
        return self

    def losses(
        self, images: Sequence[Tensor], batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """The losses of the stages that are trained.

        Args:
            images: (3, h, w) each, normalised.
            batched_inputs: see :meth:`forward`; with ``sem_seg`` as in :meth:`find` if the semantic
                map comes from "files".
        """
        return training.losses(self, images, batched_inputs)

    def find(self, image: Tensor, item: dict[str, Any]) -> tuple[inference.SGNInstances, Tensor]:
        """All stages for one image, and the (C + 1, h, w) semantic probabilities.

        Args:
            image: (3, h', w') normalised.
            item: see :meth:`forward`; with ``instances`` if a source is "truth"; with ``sem_seg``
                if the semantic map comes from "files": labels (h, w), class + 1, 0 for background,
                255 for neither, or logits (C + 1, h, w), background first.
        Raises:
            CheckpointError: the network gives values that are not finite.
            ConfigError: the input lacks what a source needs.
        """
        return inference.find(self, image, item)

    def image_maps(
        self,
        image: Tensor,
        probabilities: Tensor,
        breakpoints: Tensor,
        ground_truth: GroundTruth | None = None,
    ) -> ImageMaps:
        """Maps of one image, each from the source of its key; in training from the networks.

        Args:
            image: (3, h', w') normalised.
            probabilities: (C + 1, h, w) of the semantic map, C = 1 if no class is told apart.
            breakpoints: (2, 4, h, w) probabilities of the network.
            ground_truth: None if no source needs it.
        """
        confidence, semantic = probabilities.max(dim=0)
        breakpoint_probability = breakpoints[:, START:].sum(dim=1)
        if ground_truth is not None and self.sources["BREAKPOINTS_TEST"] == "truth":
            breakpoints = ground_truth.breakpoints().to(breakpoints)
        source = "own" if self.training else self.sources["LINKS_TEST"]
        if ground_truth is not None and source == "truth":
            links = ground_truth.links.float()
        elif source == "breakpoints":
            threshold = self.line_settings.breakpoint_threshold
            labels = most_likely_labels(breakpoints, threshold)
            links = breakpoint_links(labels, self.line_settings)
        else:
            with torch.no_grad():
                links = self.lines(breakpoints[None], confidence[None])[0].float().sigmoid()
        rows, columns = self.cells(image)
        resized = F.interpolate(image[None], (rows, columns), mode="area")[0]
        return ImageMaps(resized, semantic, confidence, breakpoints, breakpoint_probability, links)

    def breakpoint_logits(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Semantic logits (B, C + 1, h, w) and breakpoint logits (B, 2, 4, h, w) of a batch.

        Args:
            images: (3, h', w') each, normalised; padded with 0 at their right and bottom.
        """
        batch = self.padded(images, self.breakpoints.size_divisibility)
        semantic, breakpoints = self.breakpoints(batch)
        breakpoints = self.resized(breakpoints.flatten(1, 2), batch)
        return self.resized(semantic, batch), breakpoints.unflatten(1, (2, 4))

    def given_semantic(
        self,
        images: Sequence[Tensor],
        items: Sequence[dict[str, Any]],
        targets: DenseTargets | None,
        size: tuple[int, int],
    ) -> Tensor:
        """(B, C + 1, h, w) probabilities of the semantic map from elsewhere."""
        cells = [self.cells(image) for image in images]
        gt_targets = targets if self.sources["SEMANTIC"] == "truth" else None
        return given_probabilities(items, cells, gt_targets, size, self.num_classes, self.device)

    def _frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        return [getattr(self, name) for name in STAGES if name not in self.stages]
