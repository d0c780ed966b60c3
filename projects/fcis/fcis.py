"""The FCIS network: trunk, region proposals, the position-sensitive head and mask voting."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import result_size, wants_cropped
from instseg.projects.fcis.inference import Detector

_LEAST_SIDE = 32
"""Least side of a padded batch in pixels, so that every stage has a cell."""


@META_ARCH_REGISTRY.register()
class FCIS(GeneralizedRCNN):
    """Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017, 1611.07709).

    Detectron2's two stages with ``FCISRPN`` and ``FCISROIHeads``.  At test time every proposal and
    its refined copy are scored, and the regions around a detection vote on its mask; so masks are
    made here instead of being pasted from regions.
    """

    @configurable
    def __init__(self, *, detector: Detector, **kwargs: Any) -> None:
        """
        Args:
            detector: makes detections of the regions of an image.
            kwargs: those of ``GeneralizedRCNN``.
        """
        super().__init__(**kwargs)
        self.detector = detector

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.FCIS
        arguments: dict[str, Any] = super().from_config(cfg)
        arguments["detector"] = Detector(
            voting=node.VOTING_TEST,
            min_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            nms_threshold=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            merge_threshold=node.MERGE_THRESH_TEST,
            mask_threshold=node.MASK_THRESH,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        )
        return arguments

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise and batch the images; pad them at the right and bottom to the largest.

        Deviation: the authors train on one image per GPU without padding.
        """
        images: ImageList = super().preprocess_image(batched_inputs)
        height, width = images.tensor.shape[-2:]
        if min(height, width) < _LEAST_SIDE:
            missing = (0, max(_LEAST_SIDE - width, 0), 0, max(_LEAST_SIDE - height, 0))
            images = ImageList(F.pad(images.tensor, missing), images.image_sizes)
        return images

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detections in every image; the images run one by one, without padding.

        Args:
            batched_inputs: each with ``image`` (3, H, W) and optionally ``height`` and ``width`` of
                the result and ``max_instances`` in it.
        Returns:
            a dict per image with ``instances``, see :class:`Detector`.
        """
        return [{"instances": self._detect(sample)} for sample in batched_inputs]

    def _detect(self, sample: dict[str, Any]) -> Instances:
        images = self.preprocess_image([sample])
        features: dict[str, Tensor] = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        (detections,), _ = self.roi_heads(images, features, proposals)
        size, limit = result_size(sample), sample.get("max_instances")
        return self.detector(
            detections, images.image_sizes[0], size, limit, cropped=wants_cropped(sample)
        )
