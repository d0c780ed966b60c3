"""Inputs: what they bring along in place of a prediction, and how cells belong to their pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instseg.errors import ConfigError
from instseg.modeling import IGNORED, DenseTargets, dense_targets, resized_index


def given_labels(
    items: Sequence[dict[str, Any]],
    cells: Sequence[tuple[int, int]],
    truth: DenseTargets | None,
    size: tuple[int, int],
    num_classes: int,
    device: torch.device,
) -> Tensor:
    """(B, h, w) int64 semantic labels of a batch from its inputs, 0 in the padding.

    Args:
        items: inputs.
        cells: rows and columns of each picture.
        truth: of the batch; None takes each input's ``sem_seg``.
        size: rows and columns of the result.
        num_classes: without the background.
    """
    labels = torch.zeros(len(items), *size, dtype=torch.int64, device=device)
    for number, (item, (rows, columns)) in enumerate(zip(items, cells, strict=True)):
        if truth is not None:
            own = truth.semantic[number, :rows, :columns]
        else:
            own = labels_from_file(item, (rows, columns), num_classes, device)
        labels[number, :rows, :columns] = own
    return labels


def labels_from_file(
    item: dict[str, Any], size: tuple[int, int], num_classes: int, device: torch.device
) -> Tensor:
    """(h, w) int64 labels of an input's ``sem_seg``, the nearest pixel for each of ``size`` cells.

    Raises:
        ConfigError: there is none, or it has labels above ``num_classes``.
    """
    if "sem_seg" not in item:
        raise ConfigError(
            "MODEL.SGN.SEMANTIC is files, but an input has no sem_seg; set INPUT.SEMANTIC_ROOT to "
            "the folder of the label files"
        )
    labels = item["sem_seg"].to(device, torch.int64)
    rows, columns = (
        resized_index(own, other, 1, device) for own, other in zip(labels.shape, size, strict=True)
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
    """Targets of one picture of ``size`` cells, for what is taken from the truth.

    Args:
        keys: under ``MODEL.SGN``, that ask for it; for the message.
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
