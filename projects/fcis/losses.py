"""Losses of the FCIS head (sections 2.3 and 3, normalisers of the authors' code)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import NEITHER
from instseg.projects.fcis.regions import Regions, Samples


def fcis_losses(
    regions: Regions,
    samples: Samples,
    num_images: int,
    regions_per_image: int,
    mask_weight: float,
) -> dict[str, Tensor]:
    """Losses of the regions chosen in all images.

    The authors compute each loss for one image per GPU; here it is the mean over images.  They sum
    the gradients of the GPUs, so use their learning rate times the number of images here.

    Args:
        regions: with the masks of the labelled classes.
        samples: the same regions, in the same order.
        num_images: number of images in the batch.
        regions_per_image: constant divisor of ``loss_mask`` and ``loss_box``, 128, whatever the
            number of regions or instances.
        mask_weight: weight of ``loss_mask``.
    Returns:
        ``loss_cls`` (mean over the regions of an image), ``loss_mask`` (cross-entropy averaged over
        all P x P bins, ignored ones counting as 0) and ``loss_box`` (smooth L1 with sigma 1, summed
        over four deltas); zero but attached to the graph without regions.
    """
    errors = F.cross_entropy(regions.scores.float(), samples.labels, reduction="none")
    counts = torch.bincount(samples.images, minlength=num_images)
    loss_cls = (errors / counts[samples.images]).sum() / num_images

    logits = regions.mask_logits.float()
    errors = F.cross_entropy(logits, samples.masks, ignore_index=NEITHER, reduction="none")
    divisor = regions_per_image * num_images
    loss_mask = errors.mean(dim=(1, 2)).sum() * mask_weight / divisor

    deltas = regions.deltas.float()[:, 4:]
    errors = F.smooth_l1_loss(deltas, samples.deltas, reduction="none")
    loss_box = errors[samples.labels > 0].sum() / divisor
    return {"loss_cls": loss_cls, "loss_mask": loss_mask, "loss_box": loss_box}
