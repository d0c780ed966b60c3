"""Detectron2's test-time augmentation (``TEST.AUG``), for evaluation and prediction alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge, TransformList
from detectron2.modeling import META_ARCH_REGISTRY, DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg.errors import ConfigError
from instseg.modeling.checks import check_finite
from instseg.modeling.rcnn import checked_heads, predicts_as_rcnn


def check_augmentation(cfg: CfgNode) -> None:
    """Refuse ``TEST.AUG.ENABLED`` for a model that cannot use it.

    Raises:
        ConfigError: with the reason.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    if name in META_ARCH_REGISTRY and not predicts_as_rcnn(META_ARCH_REGISTRY.get(name)):
        reason = f"{name} cannot be tested on several sizes; GeneralizedRCNN can"
    elif cfg.MODEL.KEYPOINT_ON:
        reason = "it cannot merge keypoints (MODEL.KEYPOINT_ON)"
    elif cfg.MODEL.LOAD_PROPOSALS:
        reason = "proposals from a file fit one size alone (MODEL.LOAD_PROPOSALS)"
    else:
        return
    raise ConfigError(f"TEST.AUG.ENABLED is True, but {reason}; set TEST.AUG.ENABLED False")


class AugmentedRCNN(GeneralizedRCNNWithTTA):
    """A two-stage model whose boxes and masks come from several sizes of an image, mirrored too.

    Non-maximum suppression merges the boxes of all these sizes (``TEST.AUG.MIN_SIZES``,
    ``MAX_SIZE``, ``FLIP``).  The mask of a box is the mean of those that the mask head gives for it
    in all of them, and so is its ``mask_scores``, where the model scores masks.

    Results have the same fields as the model's.  The state of random numbers does not change.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Args:
            cfg: one that :func:`check_augmentation` passes.
            model: built from it; may be a DistributedDataParallel.
        """
        super().__init__(cfg, model, tta_mapper=_Sizes(cfg))
        self.training = model.training
        self._max_instances: int | None = None
        self._merged: Instances | None = None

    def _inference_one_image(self, input: Mapping[str, Any]) -> dict[str, Any]:
        self._max_instances = input.get("max_instances")
        with checked_heads(self.model):
            result: dict[str, Any] = super()._inference_one_image(input)
        self._merged = None
        return result

    def _merge_detections(self, *args: Any) -> Instances:
        merged: Instances = super()._merge_detections(*args)
        return merged[: self._max_instances]

    def _rescale_detected_boxes(
        self,
        augmented_inputs: Sequence[Mapping[str, Any]],
        merged_instances: Instances,
        tfms: Sequence[TransformList],
    ) -> list[Instances]:
        self._merged = merged_instances
        rescaled: list[Instances] = super()._rescale_detected_boxes(
            augmented_inputs, merged_instances, tfms
        )
        return rescaled

    def _reduce_pred_masks(
        self, outputs: Sequence[Instances], tfms: Sequence[TransformList]
    ) -> Tensor:
        masks: Tensor = super()._reduce_pred_masks(outputs, tfms)
        check_finite(masks)
        if self._merged is not None and outputs[0].has("mask_scores"):
            self._merged.mask_scores = torch.stack([o.mask_scores for o in outputs]).mean(dim=0)
            check_finite(self._merged.mask_scores)
        return masks


class _Sizes(DatasetMapperTTA):
    """Detectron2's mapper, but it leaves random numbers alone and skips sizes without a pixel."""

    def __call__(self, dataset_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        height, width = dataset_dict["image"].shape[-2:]
        sizes = [
            size
            for size in self.min_sizes
            if min(ResizeShortestEdge.get_output_shape(height, width, size, self.max_size)) > 0
        ]
        mapper = DatasetMapperTTA(sizes, self.max_size, self.flip)
        if not sizes:
            mapper = DatasetMapperTTA([min(height, width)], max(height, width), self.flip)
        state = np.random.get_state()
        try:
            augmented: list[dict[str, Any]] = mapper(dataset_dict)
        finally:
            np.random.set_state(state)
        return augmented
