"""Training: the losses and the samples of LineNet and MergerNet (sections 4, 5 and 7)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import DenseTargets, attached_zero, dice_loss, semantic_loss
from instseg.projects.sgn.lines import most_likely_labels
from instseg.projects.sgn.losses import breakpoint_loss, link_loss
from instseg.projects.sgn.merging import (
    Components,
    MergeSettings,
    candidate_pairs,
    crop_pairs,
    large_components,
    windows,
)
from instseg.projects.sgn.networks import LineNet, MergerNet
from instseg.projects.sgn.pipeline import (
    GroundTruth,
    ImageMaps,
    LineSettings,
    find_components,
    foreground,
    one_hot,
)
from instseg.projects.sgn.targets import (
    breakpoint_labels,
    degrade,
    link_targets,
    majority_owners,
)

if TYPE_CHECKING:
    from instseg.projects.sgn.sgn import SGN


def losses(
    model: "SGN", images: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    """See :meth:`SGN.losses`."""
    with torch.set_grad_enabled("breakpoints" in model.stages):
        semantic, breakpoints = model.breakpoint_logits(images)
    targets = model.targets(semantic, batched_inputs)
    losses: dict[str, Tensor] = {}
    # Sums over many pixels need single precision.
    with torch.autocast(model.device.type, enabled=False):
        if "breakpoints" in model.stages:
            losses.update(_breakpoint_losses(model, semantic, breakpoints, targets))
        probabilities = semantic.detach().softmax(dim=1)
        if model.sources["SEMANTIC"] != "own":
            size = (semantic.shape[2], semantic.shape[3])
            probabilities = model.given_semantic(images, batched_inputs, targets, size)
        if not model.class_aware:
            probabilities = foreground(probabilities)
            targets = replace(targets, semantic=targets.semantic.clamp(max=1))
        breakpoints = breakpoints.detach().softmax(dim=2)
        if "lines" in model.stages:
            losses["loss_links"] = line_loss(
                model.lines,
                breakpoints,
                probabilities.amax(dim=1),
                targets,
                model.line_settings.widening,
            )
        if "merger" in model.stages:
            losses["loss_merger"] = merger_loss(
                model.merger,
                list(_images(model, images, probabilities, breakpoints, targets)),
                model.line_settings,
                model.merge_settings,
                model.merge_pairs,
            )
    return losses


def _breakpoint_losses(
    model: "SGN", semantic: Tensor, breakpoints: Tensor, targets: DenseTargets
) -> dict[str, Tensor]:
    horizontal, vertical = breakpoint_labels(targets.owners, model.line_settings.widening)
    inside = targets.owners >= 0
    losses = {
        "loss_horizontal": breakpoint_loss(breakpoints[:, 0], horizontal, inside),
        "loss_vertical": breakpoint_loss(breakpoints[:, 1], vertical, inside),
        "loss_semantic": model.semantic_weight * semantic_loss(semantic, targets.semantic),
    }
    if model.dice_weight:
        losses["loss_dice"] = model.dice_weight * dice_loss(semantic, targets.semantic)
    return losses


def _images(
    model: "SGN",
    images: Sequence[Tensor],
    probabilities: Tensor,
    breakpoints: Tensor,
    targets: DenseTargets,
) -> Iterator[tuple[ImageMaps, GroundTruth]]:
    """Maps and ground truth of each image, without the padding of the batch."""
    for number, image in enumerate(images):
        rows, columns = size = model.cells(image)
        ground_truth = GroundTruth.of_image(targets, number, size, model.line_settings.widening)
        semantic, breaks = (x[number, ..., :rows, :columns] for x in (probabilities, breakpoints))
        yield model.image_maps(image, semantic, breaks), ground_truth


def line_loss(
    network: LineNet,
    breakpoints: Tensor,
    confidence: Tensor,
    targets: DenseTargets,
    widening: int,
) -> Tensor:
    """LineNet's loss; each image has predicted breakpoints or degraded ground-truth ones.

    Args:
        network: to train.
        breakpoints: (B, 2, 4, h, w) predicted probabilities, without gradient.
        confidence: (B, h, w) probability of each pixel's class.
        targets: of the batch.
        widening: of the ground-truth breakpoints.
    """
    true = [degrade(x) for x in breakpoint_labels(targets.owners, widening)]
    poor = torch.stack([one_hot(x, 4) for x in true], dim=1).to(breakpoints.dtype)
    chosen = torch.rand(len(breakpoints), 1, 1, 1, 1, device=breakpoints.device) < 0.5
    logits = network(torch.where(chosen, poor, breakpoints), confidence)
    return link_loss(logits.float(), *link_targets(targets.owners, targets.semantic))


def merger_loss(
    network: MergerNet,
    images: Sequence[tuple[ImageMaps, GroundTruth]],
    lines: LineSettings,
    settings: MergeSettings,
    max_pairs: int,
) -> Tensor:
    """MergerNet's loss on components of the first stages and on fragments of the ground truth.

    Args:
        network: to train.
        images: maps and ground truth of each.
        lines: how components are found.
        settings: which of their pairs are candidates.
        max_pairs: number of pairs, at most half of each kind.
    Returns:
        a scalar; 0 if there is no pair.
    """
    sources: list[tuple[Tensor, Tensor, Components]] = []
    pairs, labels, numbers = [], [], []
    for maps, ground_truth in images:
        predicted = most_likely_labels(maps.breakpoints, lines.breakpoint_threshold)
        for breaks, semantic, links in (
            (predicted, maps.semantic, maps.links),
            (ground_truth.labels, ground_truth.semantic, ground_truth.links),
        ):
            _, component_map = find_components(breaks, semantic, links, lines)
            components = Components.from_map(component_map.to(semantic.device), semantic)
            large = large_components(components, settings)
            candidates = candidate_pairs(components, large, settings)
            owners = majority_owners(components.map, ground_truth.owners, len(components.areas))
            owners = owners[candidates]
            candidates = candidates[(owners >= 0).all(dim=1)]
            owners = owners[(owners >= 0).all(dim=1)]
            pairs.append(candidates)
            labels.append(owners[:, 0] == owners[:, 1])
            numbers.append(torch.full((len(candidates),), len(sources), device=candidates.device))
            sources.append((maps.for_crops(), semantic, components))
    pair, label, number = torch.cat(pairs), torch.cat(labels), torch.cat(numbers)
    chosen = _half_of_each(label, max_pairs)
    if not len(chosen):
        return attached_zero(network.parameters())
    crops, targets = [], []
    for index, (pixels, semantic, components) in enumerate(sources):
        rows = chosen[number[chosen] == index]
        boxes = windows(components, pair[rows], jitter=True)
        crops.append(crop_pairs(pixels, semantic, components, pair[rows], boxes))
        targets.append(label[rows])
    logits = network(_flipped(torch.cat(crops)))
    target = torch.cat(targets).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target)


def _half_of_each(labels: Tensor, limit: int) -> Tensor:
    """Random indices of at most ``limit / 2`` true labels and as many false ones."""
    chosen = []
    for is_of_kind in (labels, ~labels):
        indices = is_of_kind.nonzero()[:, 0]
        order = torch.randperm(len(indices), device=labels.device)
        chosen.append(indices[order[: limit // 2]])
    return torch.cat(chosen)


def _flipped(crops: Tensor) -> Tensor:
    """Each crop mirrored at random, along both axes."""
    for dimension in (2, 3):
        chosen = torch.rand(len(crops), 1, 1, 1, device=crops.device) < 0.5
        crops = torch.where(chosen, crops.flip(dimension), crops)
    return crops
