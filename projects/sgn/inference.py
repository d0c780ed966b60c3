"""Prediction: from the maps of the three networks, or the ground truth, to instances."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instseg.modeling import DenseInstances, check_finite, renumbered, stage
from instseg.projects.sgn.inputs import true_targets
from instseg.projects.sgn.lines import most_likely_labels
from instseg.projects.sgn.merging import (
    Components,
    MergeSettings,
    crop_pairs,
    merge_by_owner,
    merge_greedily,
    windows,
)
from instseg.projects.sgn.networks import MergerNet
from instseg.projects.sgn.pipeline import GroundTruth, ImageMaps, find_components, foreground
from instseg.projects.sgn.targets import majority_owners

if TYPE_CHECKING:
    from instseg.projects.sgn.sgn import SGN

_PAIRS_PER_BATCH = 256
"""Crops per call of MergerNet; bounds memory."""


@dataclass(frozen=True)
class SGNInstances(DenseInstances):
    """Instances of one image, after MergerNet, and the results of the stages before.

    ``scores`` are the mean probability of the class.

    Attributes:
        labels: (2, h, w) uint8 breakpoints along rows and columns.
        lines: (h, w) int64 number of the line, -1 for none, on the CPU.
        components: the same of LineNet's components, before merging.
    """

    labels: Tensor
    lines: Tensor
    components: Tensor


@torch.no_grad()
def find(model: "SGN", image: Tensor, item: dict[str, Any]) -> tuple[SGNInstances, Tensor]:
    """See :meth:`SGN.find`."""
    rows, columns = size = model.cells(image)
    with stage("breakpoints"):
        semantic, logits = model.breakpoint_logits([image])
    # Cut off the padding.
    probabilities = semantic[0, :, :rows, :columns].softmax(dim=0)
    breakpoints = logits[0, :, :, :rows, :columns].softmax(dim=1)
    check_finite(probabilities, breakpoints)
    ground_truth, targets = None, None
    if "truth" in model.sources.values():
        keys = [key for key, source in model.sources.items() if source == "truth"]
        targets = true_targets(item, size, model.output_stride, keys, model.device)
        ground_truth = GroundTruth.of_image(targets, 0, size, model.line_settings.widening)
        if not model.class_aware:
            ground_truth = replace(ground_truth, semantic=ground_truth.semantic.clamp(max=1))
    if model.sources["SEMANTIC"] != "own":
        probabilities = model.given_semantic([image], [item], targets, size)[0]
    with stage("links"):
        grouped = probabilities if model.class_aware else foreground(probabilities)
        maps = model.image_maps(image, grouped, breakpoints, ground_truth)
    check_finite(maps.links)
    return _grouped(model, maps, probabilities, ground_truth), probabilities


def _grouped(
    model: "SGN", maps: ImageMaps, probabilities: Tensor, ground_truth: GroundTruth | None
) -> SGNInstances:
    """Lines, components and instances of one image."""
    with stage("lines"):
        threshold = model.line_settings.breakpoint_threshold
        labels = most_likely_labels(maps.breakpoints, threshold)
        lines, first = find_components(labels, maps.semantic, maps.links, model.line_settings)
        components = Components.from_map(first.to(model.device), maps.semantic)
    with stage("merging"):
        if model.sources["MERGES_TEST"] == "own":
            merged_by_network(maps, components, model.merger, model.merge_settings)
        elif ground_truth is not None and model.sources["MERGES_TEST"] == "truth":
            merged_by_ground_truth(components, ground_truth)
        large = (components.areas >= max(model.min_area, 1)).nonzero()[:, 0]
        instances = renumbered(components.map, large, len(components.areas))
        classes, scores = classes_and_scores(instances, probabilities, len(large))
        best = scores.argsort(descending=True, stable=True)[: model.max_instances]
        numbers = renumbered(instances, best, len(large))
    return SGNInstances(numbers, classes[best], scores[best], labels, lines, first)


@torch.no_grad()
def merged_by_network(
    maps: ImageMaps, components: Components, network: MergerNet, settings: MergeSettings
) -> None:
    """Merge components that MergerNet calls one instance, in place."""
    pixels = maps.for_crops()

    def score(pairs: Tensor) -> Tensor:
        batches = [
            network(
                crop_pairs(pixels, maps.semantic, components, batch, windows(components, batch))
            ).float()
            for batch in pairs.split(_PAIRS_PER_BATCH)
        ]
        scores = torch.cat([pixels.new_zeros(0), *batches]).sigmoid()
        check_finite(scores)
        return scores

    merge_greedily(components, settings, score)


def merged_by_ground_truth(components: Components, ground_truth: GroundTruth) -> None:
    """Merge components that mostly belong to one ground-truth instance, in place."""
    count = len(components.areas)
    merge_by_owner(components, majority_owners(components.map, ground_truth.owners, count))


def classes_and_scores(
    instances: Tensor, probabilities: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The class, from 0, with the highest mean probability in each instance, and that probability.

    Args:
        instances: (h, w) int64, 0 ... count - 1, each with a pixel; -1 for none.
        probabilities: (C + 1, h, w) of the semantic map.
    """
    inside = instances >= 0
    sums = probabilities.new_zeros(count, len(probabilities) - 1, dtype=torch.double)
    sums.index_add_(0, instances[inside], probabilities[1:, inside].T.double())
    areas = instances[inside].bincount(minlength=count)
    scores, classes = (sums / areas[:, None]).max(dim=1)
    return classes, scores.float()
