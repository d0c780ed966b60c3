"""Losses of the FCIS head (sections 2.3 and 3, normalisers of the authors' code)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def fcis_losses(
    scores: Tensor,
    mask_logits: Tensor,
    deltas: Tensor,
    labels: Tensor,
    targets: Tensor,
    box_targets: Tensor,
    images: Tensor,
    num_images: int,
    regions_per_image: int,
    mask_weight: float = 10.0,
) -> dict[str, Tensor]:
    """Losses of the regions chosen in all images.

    Each is a mean over images of what the authors compute for one image per GPU.  They sum the
    gradients of the GPUs, so their learning rate times the number of images is the one to use here.

    Args:
        scores: (R, C) class logits, background first.
        mask_logits: (R, 2, P, P) outside and inside logits of the labelled class.
        deltas: (R, 8) output of the box branch; the last four belong to objects.
        labels: (R,) int64, 0 for the background.
        targets: (R, P, P) int64, 1 inside, 0 outside, -1 ignored (all bins of background regions).
        box_targets: (R, 4) normalised deltas; those of background regions do not matter.
        images: (R,) int64 index of the image of each region.
        num_images: number of images in the batch.
        regions_per_image: constant divisor of ``loss_mask`` and ``loss_box``, 128, whatever the
            number of regions or of objects.
        mask_weight: weight of ``loss_mask``.
    Returns:
        ``loss_cls`` (mean over the regions of an image), ``loss_mask`` (cross-entropy averaged over
        all P x P bins, ignored ones counting as 0) and ``loss_box`` (smooth L1 with sigma 1, summed
        over four deltas); zero but attached to the graph without regions.
    """
    scores, mask_logits, deltas = scores.float(), mask_logits.float(), deltas.float()
    errors = F.cross_entropy(scores, labels, reduction="none")
    counts = torch.bincount(images, minlength=num_images)
    loss_cls = (errors / counts[images]).sum() / num_images

    errors = F.cross_entropy(mask_logits, targets, ignore_index=-1, reduction="none")
    divisor = regions_per_image * num_images
    loss_mask = errors.mean(dim=(1, 2)).sum() * mask_weight / divisor

    errors = F.smooth_l1_loss(deltas[:, 4:], box_targets, reduction="none")
    loss_box = errors[labels > 0].sum() / divisor
    return {"loss_cls": loss_cls, "loss_mask": loss_mask, "loss_box": loss_box}
