"""Make a trained model faster without changing what it computes."""

from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn


def optimize(model: nn.Module) -> nn.Module:
    """Fold batch normalisation into convolutions and store weights channels last, in place.

    Folded are all modules built like Detectron2's ``Conv2d``: a 4-dimensional ``weight``, a
    ``bias`` and a ``norm`` applied right after the convolution.  Deformable convolutions of
    YOLACT++ are.  Other normalisations stay.  Results differ by rounding alone.

    The names of its parameters change: save a checkpoint before, not after.

    Args:
        model: in evaluation mode.
    Returns:
        ``model``.
    Raises:
        ValueError: it is in training mode, where batch normalisation uses the batch's statistics.
    """
    if model.training:
        raise ValueError("optimize() needs a model in evaluation mode; call model.eval() first")
    for module in model.modules():
        if _foldable(module):
            _fold(module)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _foldable(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return False
    if isinstance(module, nn.ConvTranspose2d) or not hasattr(module, "bias"):
        return False
    norm = getattr(module, "norm", None)
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    # Without running statistics it normalises with those of the batch.
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


@torch.no_grad()
def _fold(module: Any) -> None:
    """Replace ``norm(conv(x))`` by a convolution with other weights."""
    norm = module.norm
    # Double precision: rounded once, not at every step.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if module.bias is not None:
        shift = shift + module.bias.double() * scale
    weight = module.weight.double() * scale[:, None, None, None]
    dtype, trainable = module.weight.dtype, module.weight.requires_grad
    # New parameters: modules that share their weights may have normalisations of their own.
    module.weight = nn.Parameter(weight.to(dtype), trainable)
    module.bias = nn.Parameter(shift.to(dtype), trainable)
    module.norm = None
