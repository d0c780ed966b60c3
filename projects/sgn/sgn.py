"""The meta-architecture: three networks in sequence."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.masks import keep_masks, tight_boxes
from instseg.modeling import (
    DenseTargets,
    PixelModel,
    at_size,
    check_finite,
    dense_targets,
    dice_loss,
    padded_batch,
    resized_index,
    semantic_loss,
    stage,
)
from instseg.ops.sgn_lines import START
from instseg.projects.sgn.config import SOURCES, STAGES, check_sgn_config
from instseg.projects.sgn.inputs import given_probabilities, true_targets
from instseg.projects.sgn.lines import most_likely_labels
from instseg.projects.sgn.losses import breakpoint_loss
from instseg.projects.sgn.merging import Components, MergeSettings
from instseg.projects.sgn.networks import BreakpointNet, LineNet, MergerNet
from instseg.projects.sgn.pipeline import (
    Found,
    LineSettings,
    PictureMaps,
    Truth,
    breakpoint_links,
    classes_and_scores,
    find_components,
    foreground,
    keep_large,
    merged_by_network,
    merged_by_truth,
)
from instseg.projects.sgn.targets import breakpoint_labels
from instseg.projects.sgn.training import line_loss, merger_loss


@META_ARCH_REGISTRY.register()
class SGN(PixelModel):
    """After SGN: Sequential Grouping Networks (Liu, Jia, Fidler, Urtasun, ICCV 2017).

    ::

        picture → BreakpointNet → semantic map, breakpoints along rows and columns
          → lines, cut by breakpoints → LineNet: links → components
          → MergerNet: pairs of components → instances

    Each network is trained on what those before it give, without a gradient into them.
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
        stages: Sequence[str] = STAGES,
        class_aware: bool = True,
        sources: dict[str, str] | None = None,
        output_stride: int = 1,
        semantic_weight: float = 1.0,
        dice_weight: float = 0.0,
        line_settings: LineSettings | None = None,
        merge_settings: MergeSettings | None = None,
        merge_pairs: int = 64,
        min_area: int = 50,
        max_instances: int = 100,
        give_semantic: bool = False,
    ) -> None:
        """
        Args:
            breakpoints, lines, merger: the networks.
            pixel_mean, pixel_std: see :class:`~instseg.modeling.PixelModel`.
            num_classes: without the background.
            stages: networks to train, of ``STAGES``.
            class_aware: whether lines end where the class changes.
            sources: by the keys of ``SOURCES``; those not named are "own".
            output_stride: pixels per cell of the maps.
            semantic_weight, dice_weight: of the semantic map's losses.
            line_settings, merge_settings: None for the defaults.
            merge_pairs: pairs per batch to train MergerNet on.
            min_area: cells of an instance at least.
            max_instances: the best so many are given.
            give_semantic: give the semantic probabilities as ``sem_seg`` too.
        """
        super().__init__(pixel_mean, pixel_std)
        self.breakpoints = breakpoints
        self.lines = lines
        self.merger = merger
        self.stages = tuple(stages)
        for network in self._frozen():
            network.requires_grad_(False)
        self.num_classes = num_classes
        self.class_aware = class_aware
        self.sources = {**dict.fromkeys(SOURCES, "own"), **(sources or {})}
        self.output_stride = output_stride
        self.semantic_weight = semantic_weight
        self.dice_weight = dice_weight
        self.line_settings = line_settings or LineSettings()
        self.merge_settings = merge_settings or MergeSettings()
        self.merge_pairs = merge_pairs
        self.min_area = min_area
        self.max_instances = max_instances
        self.give_semantic = give_semantic

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.SGN
        check_sgn_config(cfg)
        return {
            "breakpoints": BreakpointNet(
                build_backbone(cfg),
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
                most=node.MERGE_MAX_COMPONENTS,
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

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's: ``image`` (3, h, w) in 0..255; for training, and where a
                source is "truth", ``instances`` with ``gt_classes`` and ``gt_masks``; where the
                semantic map comes from "files", ``sem_seg``: labels (h, w), class + 1, 0 for
                background, 255 for neither, or logits (C + 1, h, w), background first; optionally
                ``height``, ``width``, ``max_instances`` of the result.
        Returns:
            in training a dict of scalar losses, else a list of dicts with ``instances``:
            ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks`` (N, height, width) bool,
            which do not overlap; and ``sem_seg`` (C + 1, height, width) if asked for.
        Raises:
            CheckpointError: not in training, the network gives values that are not finite.
            ConfigError: an input lacks what a source needs.
        """
        images = self.normalised_images(batched_inputs)
        if self.training:
            return self.losses(images, batched_inputs)
        # One by one: the padding of a batch would change results.
        return [
            self.segment(image, item) for image, item in zip(images, batched_inputs, strict=True)
        ]

    def losses(
        self, images: Sequence[Tensor], batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """The losses of the stages that are trained."""
        with torch.set_grad_enabled("breakpoints" in self.stages):
            semantic, breakpoints = self._breakpoint_logits(images)
        stride = self.output_stride
        size = (semantic.shape[2] * stride, semantic.shape[3] * stride)
        targets = dense_targets([x["instances"] for x in batched_inputs], size, stride, self.device)
        losses: dict[str, Tensor] = {}
        # Sums over many pixels need single precision.
        with torch.autocast(self.device.type, enabled=False):
            if "breakpoints" in self.stages:
                labels = breakpoint_labels(targets.owners, self.line_settings.widening)
                inside = targets.owners >= 0
                losses["loss_horizontal"] = breakpoint_loss(breakpoints[:, 0], labels[0], inside)
                losses["loss_vertical"] = breakpoint_loss(breakpoints[:, 1], labels[1], inside)
                losses["loss_semantic"] = self.semantic_weight * semantic_loss(
                    semantic, targets.semantic
                )
                if self.dice_weight:
                    losses["loss_dice"] = self.dice_weight * dice_loss(semantic, targets.semantic)
            probabilities = semantic.detach().softmax(dim=1)
            if self.sources["SEMANTIC"] != "own":
                size = (semantic.shape[2], semantic.shape[3])
                probabilities = self._given_semantic(images, batched_inputs, targets, size)
            if not self.class_aware:
                probabilities = foreground(probabilities)
                targets = replace(targets, semantic=targets.semantic.clamp(max=1))
            breakpoints = breakpoints.detach().softmax(dim=2)
            if "lines" in self.stages:
                widening = self.line_settings.widening
                confidence = probabilities.amax(dim=1)
                losses["loss_links"] = line_loss(
                    self.lines, breakpoints, confidence, targets, widening
                )
            if "merger" in self.stages:
                losses["loss_merger"] = self._merger_loss(
                    images, probabilities, breakpoints, targets
                )
        return losses

    def _merger_loss(
        self,
        images: Sequence[Tensor],
        probabilities: Tensor,
        breakpoints: Tensor,
        targets: DenseTargets,
    ) -> Tensor:
        pictures = []
        for number, image in enumerate(images):
            rows, columns = self._cells(image)
            truth = Truth.of_picture(targets, number, (rows, columns), self.line_settings.widening)
            semantic, breaks = (
                x[number, ..., :rows, :columns] for x in (probabilities, breakpoints)
            )
            pictures.append((self._picture_maps(image, semantic, breaks), truth))
        loss = merger_loss(
            self.merger, pictures, self.line_settings, self.merge_settings, self.merge_pairs
        )
        if loss is None:
            return torch.stack([x.sum() for x in self.merger.parameters()]).sum() * 0
        return loss

    def segment(self, image: Tensor, item: dict[str, Any]) -> dict[str, Any]:
        """Result of one picture.

        Args:
            image: (3, h, w) normalised.
            item: see :meth:`forward`.
        """
        found, probabilities = self.find(image, item)
        size = int(item.get("height", image.shape[1])), int(item.get("width", image.shape[2]))
        with stage("masks"):
            best = found.scores.argsort(descending=True, stable=True)
            best = best[: self.max_instances][: item.get("max_instances")]
            rows, columns = (
                resized_index(own, other, self.output_stride, self.device)
                for own, other in zip(image.shape[1:], size, strict=True)
            )
            masks = found.instances[rows][:, columns] == best[:, None, None]
            kept = masks.any(dim=2).any(dim=1)  # a tiny object may vanish in a smaller result
            instances = Instances(size)
            masks = keep_masks(masks, kept)
            instances.pred_boxes = Boxes(tight_boxes(masks))
            instances.scores = found.scores[best][kept]
            instances.pred_classes = found.classes[best][kept]
            instances.pred_masks = masks
        result: dict[str, Any] = {"instances": instances}
        if self.give_semantic:
            result["sem_seg"] = probabilities[:, rows][:, :, columns]
        return result

    @torch.no_grad()
    def find(self, image: Tensor, item: dict[str, Any]) -> tuple[Found, Tensor]:
        """All stages for one picture, and the (C + 1, h, w) semantic probabilities.

        Args:
            image: (3, h, w) normalised.
            item: see :meth:`forward`.
        """
        rows, columns = self._cells(image)
        with stage("breakpoints"):
            semantic, logits = self._breakpoint_logits([image])
        # What the padding shows is not part of the picture.
        probabilities = semantic[0, :, :rows, :columns].softmax(dim=0)
        breakpoints = logits[0, :, :, :rows, :columns].softmax(dim=1)
        check_finite(probabilities, breakpoints)
        size, truth, targets = (rows, columns), None, None
        if "truth" in self.sources.values():
            truths = [key for key, source in self.sources.items() if source == "truth"]
            targets = true_targets(item, size, self.output_stride, truths, self.device)
            truth = Truth.of_picture(targets, 0, size, self.line_settings.widening)
            if not self.class_aware:
                truth = replace(truth, semantic=truth.semantic.clamp(max=1))
        if self.sources["SEMANTIC"] != "own":
            probabilities = self._given_semantic([image], [item], targets, size)[0]
        with stage("links"):
            grouped = probabilities if self.class_aware else foreground(probabilities)
            maps = self._picture_maps(image, grouped, breakpoints, truth)
        check_finite(maps.links)
        return self._group(maps, probabilities, truth), probabilities

    def _group(self, maps: PictureMaps, probabilities: Tensor, truth: Truth | None) -> Found:
        """Lines, components and instances of one picture."""
        with stage("lines"):
            threshold = self.line_settings.breakpoint_threshold
            labels = most_likely_labels(maps.breakpoints, threshold)
            lines, first = find_components(labels, maps.semantic, maps.links, self.line_settings)
            components = Components.from_map(first.to(self.device), maps.semantic)
        with stage("merging"):
            if self.sources["MERGES_TEST"] == "own":
                merged_by_network(maps, components, self.merger, self.merge_settings)
            elif truth is not None and self.sources["MERGES_TEST"] == "truth":
                merged_by_truth(components, truth)
            instances, kept = keep_large(components, self.min_area)
        classes, scores = classes_and_scores(instances, probabilities, len(kept))
        return Found(labels, lines, first, instances, classes, scores)

    def _picture_maps(
        self,
        image: Tensor,
        probabilities: Tensor,
        breakpoints: Tensor,
        truth: Truth | None = None,
    ) -> PictureMaps:
        """Maps of one picture, each from where its key says, the networks' in training.

        Args:
            image: (3, h', w') normalised.
            probabilities: (C + 1, h, w) of the semantic map, C = 1 if no class is told apart.
            breakpoints: (2, 4, h, w) probabilities of the network.
            truth: None if no source needs it.
        """
        confidence, semantic = probabilities.max(dim=0)
        seen = breakpoints[:, START:].sum(dim=1)
        if truth is not None and self.sources["BREAKPOINTS_TEST"] == "truth":
            breakpoints = truth.breakpoints().to(breakpoints)
        source = "own" if self.training else self.sources["LINKS_TEST"]
        if truth is not None and source == "truth":
            links = truth.links.float()
        elif source == "breakpoints":
            threshold = self.line_settings.breakpoint_threshold
            labels = most_likely_labels(breakpoints, threshold)
            links = breakpoint_links(labels, self.line_settings)
        else:
            with torch.no_grad():
                links = self.lines(breakpoints[None], confidence[None])[0].sigmoid()
        rows, columns = self._cells(image)
        picture = F.interpolate(image[None], (rows, columns), mode="area")[0]
        return PictureMaps(picture, semantic, confidence, breakpoints, seen, links)

    def _breakpoint_logits(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Semantic logits (B, C + 1, h, w) and breakpoint logits (B, 2, 4, h, w) of a batch.

        Args:
            images: (3, h', w') each, normalised; padded with 0 at their right and bottom.
        """
        divisor = max(self.breakpoints.size_divisibility, self.output_stride)
        batch = padded_batch(images, divisor)
        semantic, breakpoints = self.breakpoints(batch)
        size = (batch.shape[2] // self.output_stride, batch.shape[3] // self.output_stride)
        breakpoints = at_size(breakpoints.flatten(1, 2), size)
        return at_size(semantic, size), breakpoints.unflatten(1, (2, 4))

    def _given_semantic(
        self,
        images: Sequence[Tensor],
        items: Sequence[dict[str, Any]],
        targets: DenseTargets | None,
        size: tuple[int, int],
    ) -> Tensor:
        """(B, C + 1, h, w) probabilities of the semantic map from elsewhere."""
        cells = [self._cells(image) for image in images]
        truth = targets if self.sources["SEMANTIC"] == "truth" else None
        return given_probabilities(items, cells, truth, size, self.num_classes, self.device)

    def _cells(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the maps of a picture (3, h, w)."""
        height, width = (-(-length // self.output_stride) for length in image.shape[1:])
        return height, width

    def _frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        return [getattr(self, name) for name in STAGES if name not in self.stages]
