"""The meta-architecture YOLACT."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.errors import ConfigError
from instseg.modeling import (
    PixelModel,
    check_finite,
    cross_class_nms,
    fast_nms,
    result_size,
    stage,
    wants_cropped,
)
from instseg.ops.assemble_masks import assemble_masks
from instseg.projects.yolact.assembly import assemble_cropped
from instseg.projects.yolact.boxes import anchors_by_level, decode, level_sizes, make_priors
from instseg.projects.yolact.layers import (
    FeaturePyramid,
    HeadByLevel,
    PredictionHead,
    ProtoNet,
    conv,
)
from instseg.projects.yolact.losses import (
    GroundTruth,
    LossSettings,
    MaskSamples,
    Predictions,
    ground_truth_of,
    yolact_losses,
)

_NMS = {"fast": fast_nms, "cross_class": cross_class_nms}


@dataclass(frozen=True)
class DetectionSettings:
    """See the keys ``*_TEST`` and ``NMS`` under ``MODEL.YOLACT``, and ``TEST``."""

    score_threshold: float
    nms: str
    nms_threshold: float
    nms_top_k: int
    detection_score_threshold: float
    max_detections: int
    truncate_boxes: bool
    crop_masks: bool


@dataclass(frozen=True)
class Detections:
    """Detections of one image, by descending score.

    Attributes:
        boxes: (N, 4) corners relative to the image, not clipped.
        scores: (N,) probability of the class.
        classes: (N,) int64 from 0.
        coefficients: (N, K) of the mask.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    coefficients: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Detections":
        """The detections at ``rows``: indices, a slice or a (N,) bool."""
        return Detections(
            self.boxes[rows], self.scores[rows], self.classes[rows], self.coefficients[rows]
        )


@META_ARCH_REGISTRY.register()
class YOLACT(PixelModel):
    """Real-time instance segmentation (Bolya et al., ICCV 2019, arXiv 1904.02689).

    One stage: a network makes prototype masks of the whole image while a head predicts, for every
    anchor, classes, a box and coefficients; a mask is the sum of the prototypes by coefficients,
    cropped with the box.

    ::

        image, stretched to S x S → backbone: C3, C4, C5 → pyramid: P3..P7 (256)
          P3 → ProtoNet → prototypes (S/4, S/4, K)
          P3..P7 → head → deltas (P, 4), logits (P, C + 1), coefficients (P, K) of P anchors
          P3 → semantic logits (C, S/8, S/8), in training alone

    Images of any size are taken.  They are stretched to the square here (bilinear, not
    antialiased), as the authors do, and results are for the original size; with
    ``INPUT.MIN_SIZE_TEST 0`` nothing resizes them before.

    The network can be compiled and exported, see :class:`instseg.modeling.SplitModel`.
    """

    num_classes_key = "MODEL.YOLACT.NUM_CLASSES"
    raw_names = ("deltas", "logits", "coefficients", "prototypes")

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        fpn: FeaturePyramid,
        protonet: nn.Module,
        head: nn.Module,
        semantic: nn.Module | None,
        priors: Tensor,
        image_size: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        loss_settings: LossSettings,
        detection_settings: DetectionSettings,
    ) -> None:
        """
        Args:
            backbone: with outputs at strides 8, 16, 32.
            fpn: makes P3..P7 of them.
            protonet: see :class:`ProtoNet`.
            head: see :class:`PredictionHead`.
            semantic: (B, channels, h, w) → (B, C, h, w), in training alone; None for no such loss.
            priors: (P, 4) anchors, see :func:`~instseg.projects.yolact.boxes.make_priors`.
            image_size: side S of the square.
            pixel_mean, pixel_std: see :class:`~instseg.modeling.PixelModel`.
            loss_settings, detection_settings: see their classes.
        """
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.fpn = fpn
        self.protonet = protonet
        self.head = head
        self.semantic = semantic
        self.image_size = image_size
        self.loss_settings = loss_settings
        self.detection_settings = detection_settings
        self._levels = in_order(backbone.output_shape())
        self.priors: Tensor
        self.register_buffer("priors", priors, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.YOLACT
        size = cfg.INPUT.SQUARE_SIZE
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        levels = in_order(shapes)
        anchors = anchors_by_level(node.ANCHOR_SCALES, node.ANCHOR_RATIOS)
        channels = node.CHANNELS
        heads = [
            PredictionHead(node.NUM_CLASSES, count, node.NUM_PROTOTYPES, channels, node.HEAD_NORM)
            for count in anchors[: 1 if node.SHARE_HEAD else None]
        ]
        return {
            "backbone": backbone,
            "fpn": FeaturePyramid([shapes[name].channels for name in levels], channels, node.NORM),
            "protonet": ProtoNet(channels, node.PROTO_CONVS, node.NUM_PROTOTYPES, node.NORM),
            "head": heads[0] if node.SHARE_HEAD else HeadByLevel(heads),
            "semantic": conv(channels, node.NUM_CLASSES, 1) if node.SEMANTIC_WEIGHT else None,
            "priors": make_priors(
                size,
                level_sizes(size, FeaturePyramid.strides),
                node.ANCHOR_SCALES,
                node.ANCHOR_RATIOS,
                square=node.SQUARE_ANCHORS,
            ),
            "image_size": size,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "loss_settings": LossSettings(
                positive_iou=node.POSITIVE_IOU,
                negative_iou=node.NEGATIVE_IOU,
                crowd_iou=node.CROWD_IOU,
                negative_ratio=node.NEGATIVE_RATIO,
                box_weight=node.BOX_WEIGHT,
                class_weight=node.CLASS_WEIGHT,
                mask_weight=node.MASK_WEIGHT,
                semantic_weight=node.SEMANTIC_WEIGHT,
                max_masks=node.MASKS_TRAIN,
            ),
            "detection_settings": DetectionSettings(
                score_threshold=node.SCORE_THRESH_TEST,
                nms=node.NMS,
                nms_threshold=node.NMS_THRESH_TEST,
                nms_top_k=node.NMS_TOP_K_TEST,
                detection_score_threshold=node.DETECTION_SCORE_THRESH_TEST,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                truncate_boxes=node.TRUNCATE_BOXES_TEST,
                crop_masks=node.CROP_MASKS_TEST,
            ),
        }

    def unused_in_inference(self) -> tuple[str, ...]:
        """See :class:`instseg.modeling.contract.TrainingOnlyModule`."""
        return ("semantic",)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: in Detectron2's format: ``image`` (3, h, w) in 0..255; optionally
                ``height`` and ``width`` of the result and ``max_instances`` in it; for training
                ``instances`` with ``gt_boxes``, ``gt_classes``, ``gt_masks``, and ``crowd_boxes``
                (``Boxes``) if there are crowds.
        Returns:
            in training a dict of scalar losses, else a list of dicts with ``instances``:
            ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks`` (N, height, width) bool.
        Raises:
            CheckpointError: not in training, the network gives values that are not finite.
        """
        images = self.preprocess(batched_inputs)
        if self.training:
            return self.losses(images, batched_inputs)
        with stage("network"):
            outputs = self.raw(images)
        return self.postprocess(outputs, batched_inputs)

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        """Stretch to the square and normalise: (B, 3, S, S)."""
        size = (self.image_size, self.image_size)
        images = []
        for item in batched_inputs:
            image = item["image"].to(self.device, torch.float32)[None]
            if image.shape[-2:] != size:
                image = F.interpolate(image, size, mode="bilinear", align_corners=False)
            images.append(image)
        return self.normalised(torch.cat(images))

    def levels(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) normalised → C3, C4, C5."""
        outputs = self.backbone(images)
        return [outputs[name] for name in self._levels]

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) normalised → P3..P7."""
        pyramid: list[Tensor] = self.fpn(self.levels(images))
        return pyramid

    def raw(self, images: Tensor) -> tuple[Tensor, ...]:
        """The network of prediction: tensors in, tensors out, for compilation and export.

        Args:
            images: (B, 3, S, S) normalised.
        Returns:
            deltas (B, P, 4), logits (B, P, C + 1), coefficients (B, P, K), prototypes (B, h, w, K).
        """
        return self.heads(self.features(images))

    def heads(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """P3..P7 → what :meth:`raw` returns."""
        return (*self.head(pyramid), self.protonet(pyramid[0]))

    def losses(self, images: Tensor, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """All losses of a batch."""
        ground_truths = [ground_truth_of(item, self.device) for item in batched_inputs]
        return self.detection_losses(self.features(images), ground_truths)

    def detection_losses(
        self, pyramid: Sequence[Tensor], ground_truths: Sequence[GroundTruth]
    ) -> dict[str, Tensor]:
        """The losses of the predictions from P3..P7."""
        outputs = self.heads(pyramid)
        semantic = None if self.semantic is None else self.semantic(pyramid[0])
        # Sums over many anchors and probabilities near 0 and 1 need single precision.
        with torch.autocast(self.device.type, enabled=False):
            deltas, logits, coefficients, prototypes = (x.float() for x in outputs)
            semantic = None if semantic is None else semantic.float()
            predictions = Predictions(deltas, logits, coefficients, prototypes, semantic)
            losses, samples = yolact_losses(
                predictions, ground_truths, self.priors, self.loss_settings
            )
            losses.update(self.extra_losses(samples))
        return losses

    def extra_losses(self, samples: MaskSamples) -> dict[str, Tensor]:
        """Losses of a descendant on the masks of positive anchors."""
        return {}

    def extra_networks(self) -> dict[str, Tensor]:
        """See :class:`instseg.modeling.SplitModel`; YOLACT has none."""
        return {}

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Results of a batch, each at the size asked for; boxes without area are left out.

        Args:
            outputs: of :meth:`raw`.
            batched_inputs: see :meth:`forward`.
        Raises:
            CheckpointError: values that are not finite.
        """
        outputs = [x.float() for x in outputs]
        check_finite(*outputs)
        results = []
        for item, deltas, logits, coefficients, prototypes in zip(
            batched_inputs, *outputs, strict=True
        ):
            size = result_size(item)
            with stage("post-processing"):
                detections = self.detect(deltas, logits, coefficients)
                detections = detections[self.pixel_boxes(detections, size).nonempty()]
                detections = detections[: item.get("max_instances")]
            cropped = wants_cropped(item)
            instances = self.finish(detections, prototypes, size, cropped=cropped)
            results.append({"instances": instances})
        return results

    def detect(self, deltas: Tensor, logits: Tensor, coefficients: Tensor) -> Detections:
        """Select the detections of one image (section 3.3).

        Args:
            deltas: (P, 4).
            logits: (P, C + 1), background first.
            coefficients: (P, K).
        """
        settings = self.detection_settings
        scores = logits.softmax(dim=1)[:, 1:]
        candidates = (scores.amax(dim=1) > settings.score_threshold).nonzero()[:, 0]
        boxes = decode(deltas[candidates], self.priors[candidates])
        check_finite(boxes)  # sizes are exponentials
        rows, classes, best = _NMS[settings.nms](
            boxes,
            scores[candidates].T,
            iou_threshold=settings.nms_threshold,
            top_k=settings.nms_top_k,
            max_detections=settings.max_detections,
            min_score=settings.detection_score_threshold,
        )
        return Detections(boxes[rows], best, classes, coefficients[candidates[rows]])

    def finish(
        self,
        detections: Detections,
        prototypes: Tensor,
        size: tuple[int, int],
        *,
        cropped: bool = False,
    ) -> Instances:
        """Detections of one image as Instances with masks of ``size`` (height, width)."""
        instances = Instances(size)
        instances.pred_boxes = self.pixel_boxes(detections, size)
        instances.scores = detections.scores
        instances.pred_classes = detections.classes
        extents = in_pixels(self.mask_extents(detections), size)
        with stage("mask assembly"):
            assemble = assemble_cropped if cropped else assemble_masks
            instances.pred_masks = assemble(prototypes, detections.coefficients, extents, size)
        return instances

    def mask_extents(self, detections: Detections) -> Tensor:
        """(N, 4) relative corners of what a mask may cover: its box, or the whole image."""
        if self.detection_settings.crop_masks:
            return detections.boxes
        return detections.boxes.new_tensor([0, 0, 1, 1]).expand_as(detections.boxes)

    def pixel_boxes(self, detections: Detections, size: tuple[int, int]) -> Boxes:
        """Boxes in pixels of an image of ``size``, cut at its edges; empty where they miss it."""
        boxes = Boxes(in_pixels(detections.boxes, size))
        boxes.clip(size)
        if self.detection_settings.truncate_boxes:
            boxes.tensor.trunc_()
        return boxes


def in_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) relative corners → corners in pixels of an image of ``size`` (height, width)."""
    height, width = size
    return boxes * boxes.new_tensor([width, height, width, height])


def in_order(shapes: dict[str, ShapeSpec]) -> list[str]:
    """Names of C3, C4, C5 among the outputs of a backbone.

    Raises:
        ConfigError: its outputs have other strides than 8, 16, 32.
    """
    names = sorted(shapes, key=lambda name: shapes[name].stride or 0)
    strides = [shapes[name].stride for name in names]
    if strides != list(FeaturePyramid.strides[:3]):
        raise ConfigError(
            f"YOLACT needs a backbone with outputs at strides 8, 16, 32; MODEL.BACKBONE.NAME gives "
            f"{dict(zip(names, strides, strict=True))}; of a ResNet, set "
            "MODEL.RESNETS.OUT_FEATURES ['res3', 'res4', 'res5']"
        )
    return names
