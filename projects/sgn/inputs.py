"""Semantic maps and annotations of inputs, resized to the cells of the maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instseg.errors import ConfigError
from instseg.modeling import IGNORED, DenseTargets, at_size, dense_targets, resized_index
from instseg.projects.sgn.pipeline import one_hot


def given_probabilities(
    items: Sequence[dict[str, Any]],
    cells: Sequence[tuple[int, int]],
    gt_targets: DenseTargets | None,
    size: tuple[int, int],
    num_classes: int,
    device: torch.device,
) -> Tensor:
    """(B, C + 1, h, w) semantic probabilities of a batch from its inputs; padding is background.

    Args:
        items: inputs.
        cells: rows and columns of each image.
        gt_targets: targets of the batch; None takes each input's ``sem_seg``.
        size: rows and columns of the result.
        num_classes: C, without the background.
    """
    probabilities = torch.zeros(len(items), num_classes + 1, *size, device=device)
    probabilities[:, 0] = 1
    for number, (item, (rows, columns)) in enumerate(zip(items, cells, strict=True)):
        if gt_targets is not None:
            labels = gt_targets.semantic[number, :rows, :columns]
            of_item = one_hot(labels[None], num_classes + 1)[0]
        else:
            of_item = probabilities_from_input(item, (rows, columns), num_classes, device)
        probabilities[number, :, :rows, :columns] = of_item
    return probabilities


def probabilities_from_input(
    item: dict[str, Any], size: tuple[int, int], num_classes: int, device: torch.device
) -> Tensor:
    """(C + 1, h, w) probabilities at ``size`` cells from the ``sem_seg`` of an input.

    ``sem_seg`` holds labels (H, W), and each cell takes the nearest; or logits (C + 1, H, W),
    background first, which are resized bilinearly before the softmax.

    Raises:
        ConfigError: ``sem_seg`` is missing or neither of these, a label is above
            ``num_classes``, or a logit is not finite.
    """
    if "sem_seg" not in item:
        raise ConfigError(
            "MODEL.SGN.SEMANTIC is files, but an input has no sem_seg; set INPUT.SEMANTIC_ROOT to "
            "the folder of the label files"
        )
    given = item["sem_seg"].to(device)
    logits = given.is_floating_point()
    fits = given.dim() == 3 and len(given) == num_classes + 1 if logits else given.dim() == 2
    if not fits or not given.numel():
        raise ConfigError(
            f"an input's sem_seg has shape {tuple(given.shape)} and type {given.dtype}; expected "
            f"labels (H, W) of whole numbers, or logits ({num_classes + 1}, H, W), background "
            "first, one for each of MODEL.SGN.NUM_CLASSES after it"
        )
    if not logits:
        return one_hot(_nearest_labels(given.long(), size, num_classes)[None], num_classes + 1)[0]
    if not given.isfinite().all():
        raise ConfigError("an input's sem_seg has logits that are not finite")
    return at_size(given[None], size)[0].softmax(dim=0)


def _nearest_labels(labels: Tensor, size: tuple[int, int], num_classes: int) -> Tensor:
    """(H, W) labels → those of the nearest pixel for each of ``size`` cells, 255 as background."""
    rows, columns = (
        resized_index(length, cells, 1, labels.device)
        for length, cells in zip(labels.shape, size, strict=True)
    )
    labels = labels[rows][:, columns]
    labels = labels.masked_fill(labels == IGNORED, 0)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise ConfigError(
            f"a semantic map has labels from {int(labels.min())} to {int(labels.max())}; "
            f"expected 0 (background) to {num_classes}, MODEL.SGN.NUM_CLASSES, or 255"
        )
    return labels


def true_targets(
    item: dict[str, Any],
    size: tuple[int, int],
    stride: int,
    keys: Sequence[str],
    device: torch.device,
) -> DenseTargets:
    """Targets of one image of ``size`` cells, for stages that take the ground truth.

    Args:
        keys: keys under ``MODEL.SGN`` that ask for it, for the message.
    Raises:
        ConfigError: the input has no annotations.
    """
    if "instances" not in item:
        raise ConfigError(
            f"MODEL.SGN.{', '.join(keys)}: truth needs the annotations of every input; set "
            "INPUT.TRUTH_TEST True to evaluate, or another source to predict"
        )
    padded = (size[0] * stride, size[1] * stride)
    return dense_targets([item["instances"]], padded, stride, device)
