"""Prediction of Detectron2's two-stage models, made to say what they would pass over."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from torch import Tensor, nn

from instseg.modeling.checks import check_finite
from instseg.modeling.results import result_size

_HEADS = ("rpn_head", "box_predictor")
"""Names of the modules whose outputs Detectron2 drops where they are not finite."""


def is_rcnn(model: nn.Module) -> bool:
    """Whether ``model`` predicts as ``GeneralizedRCNN`` does, not in a way of its own."""
    return predicts_as_rcnn(type(model))


def predicts_as_rcnn(kind: object) -> bool:
    """:func:`is_rcnn` of the objects of a class."""
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
    """``model(batched_inputs)``, but for what masks of the image's size are made of.

    Values are checked, and of more than ``max_instances`` objects of an input the best are taken.

    Raises:
        CheckpointError: the network gives values that are not finite.
    """
    with checked_heads(model):
        found = model.inference(batched_inputs, do_postprocess=False)
    for instances in found:
        check_finite(*_floats(list(instances.get_fields().values())))
    results = []
    for instances, item in zip(found, batched_inputs, strict=True):
        best = instances[: item.get("max_instances")]
        results.append({"instances": detector_postprocess(best, *result_size(item))})
    return results


@contextmanager
def checked_heads(model: nn.Module) -> Iterator[None]:
    """Inside, what the heads of ``model`` give must be finite."""
    heads = [part for name, part in model.named_modules() if name.rpartition(".")[2] in _HEADS]
    # A cascade has a list of predictors, which is never called itself.
    modules = [x for part in heads for x in (part if isinstance(part, nn.ModuleList) else [part])]
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, outputs: check_finite(*_floats(outputs))
        )
        for module in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
