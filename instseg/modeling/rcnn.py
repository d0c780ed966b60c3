"""Prediction of Detectron2's two-stage models, which reports values that they would drop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor, nn

from instseg.modeling.checks import check_finite
from instseg.modeling.pasting import pasted
from instseg.modeling.results import masks_of, result_size, wants_cropped

_HEADS = ("rpn_head", "box_predictor")
"""Names of the modules whose outputs Detectron2 drops where they are not finite."""
_LAST = (*_HEADS, "predictor")
"""Names of the modules whose outputs become scores, boxes and masks; the last is that of masks."""
_BOXES = 100
"""Number of boxes of an image whose masks are computed together; Detectron2's default number.

The head of Mask R-CNN takes about 2 MiB for each.
"""


def is_rcnn(model: nn.Module) -> bool:
    """Whether ``model`` predicts as ``GeneralizedRCNN`` does, not in a way of its own."""
    return predicts_as_rcnn(type(model))


def predicts_as_rcnn(kind: object) -> bool:
    """:func:`is_rcnn` of the models of a class."""
    return (
        isinstance(kind, type)
        and issubclass(kind, GeneralizedRCNN)
        and all(
            getattr(kind, name) is getattr(GeneralizedRCNN, name)
            for name in ("forward", "inference", "_postprocess")
        )
    )


def predict_rcnn(
    model: GeneralizedRCNN, batched_inputs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """``model(batched_inputs)``, with masks as each input asks, and with its values checked.

    If an input has more than ``max_instances`` instances, the best are taken.

    Raises:
        CheckpointError: the network gives values that are not finite.
    """
    with checked_heads(model), heads_in_parts(model):
        instances_of_images = model.inference(batched_inputs, do_postprocess=False)
    for instances in instances_of_images:
        check_finite(*_floats(list(instances.get_fields().values())))
    results = []
    for instances, item in zip(instances_of_images, batched_inputs, strict=True):
        best = instances[: item.get("max_instances")]
        results.append({"instances": postprocess_rcnn(best, item)})
    return results


def postprocess_rcnn(instances: Instances, item: Mapping[str, Any]) -> Instances:
    """Detectron2's ``detector_postprocess``, with dense or cropped masks as the input asks.

    Args:
        instances: of one image, as the heads give them; their boxes are changed.
        item: the input.
    """
    if instances.has("pred_masks"):
        instances.pred_masks = SoftMasks(instances.pred_masks[:, 0], cropped=wants_cropped(item))
    result: Instances = detector_postprocess(instances, *result_size(item))
    return result


class SoftMasks(ROIMasks):
    """Masks of boxes that Detectron2's ``detector_postprocess`` has pasted by our own code."""

    def __init__(self, tensor: Tensor, *, cropped: bool) -> None:
        """
        Args:
            tensor: (N, M, M) probabilities.
            cropped: give cropped masks, else dense ones.
        """
        super().__init__(tensor)
        self.cropped = cropped

    def __getitem__(self, item: Any) -> "SoftMasks":
        return SoftMasks(self.tensor[item], cropped=self.cropped)

    def to_bitmasks(
        self, boxes: Boxes, height: int, width: int, threshold: float = 0.5
    ) -> SimpleNamespace:
        """(N, H, W) bool or cropped masks, as the ``tensor`` that Detectron2 takes."""
        size = (height, width)
        placed = pasted(self.tensor, boxes.tensor, size, threshold)
        masks = masks_of(placed, len(self), size, cropped=self.cropped, device=self.tensor.device)
        return SimpleNamespace(tensor=masks)


class EvaluatedRCNN(nn.Module):
    """A two-stage model, evaluated as it predicts: :func:`predict_rcnn`."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # Detectron2's evaluation restores it, in the model as well

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return predict_rcnn(self.model, batched_inputs)


@contextmanager
def checked_heads(model: nn.Module) -> Iterator[None]:
    """Inside, what the heads of ``model`` give must be finite, and is in single precision."""
    hooks = []
    for name, part in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in _LAST:
            continue
        # A cascade has a list of predictors, which is never called itself.
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            change = _checked if kind in _HEADS else _single
            hooks.append(module.register_forward_hook(change))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _checked(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    check_finite(*_floats(outputs))
    return _single(module, inputs, outputs)


def _single(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Halves in ``outputs``, a tensor or sequences of them, as float32."""
    if isinstance(outputs, list | tuple):
        return type(outputs)(_single(module, inputs, part) for part in outputs)
    halves = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
    return outputs.float() if halves else outputs


@contextmanager
def heads_in_parts(model: GeneralizedRCNN) -> Iterator[None]:
    """Inside, the heads that get the boxes found, such as that of masks, look at some at a time.

    Each box goes through the same operations as with all others together.
    """
    heads = model.roi_heads
    if not hasattr(heads, "forward_with_given_boxes"):
        yield
        return
    # Detectron2 calls it in every prediction.  The method of the class comes back at the end.
    heads.forward_with_given_boxes = partial(_in_parts, type(heads).forward_with_given_boxes, heads)
    try:
        yield
    finally:
        vars(heads).pop("forward_with_given_boxes", None)  # another thread may have been earlier


def _in_parts(
    whole: Callable[..., list[Instances]],
    heads: nn.Module,
    features: dict[str, Tensor],
    instances: list[Instances],
) -> list[Instances]:
    """``forward_with_given_boxes``, :data:`_BOXES` of each image at a time."""
    max_count = max(len(of_image) for of_image in instances)
    parts = [
        whole(heads, features, [of_image[start : start + _BOXES] for of_image in instances])
        for start in range(0, max(max_count, 1), _BOXES)
    ]
    return [Instances.cat(list(of_image)) for of_image in zip(*parts, strict=True)]


def _floats(value: Any) -> Iterator[Tensor]:
    """The tensors of floating-point numbers in ``value``, a tensor, boxes or sequences of them."""
    if isinstance(value, Boxes):
        value = value.tensor
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _floats(part)
