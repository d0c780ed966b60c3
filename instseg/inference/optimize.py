"""Make a trained model faster without changing what it computes."""

from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def optimize(model: nn.Module) -> nn.Module:
    """Fold batch normalisation into convolutions and store weights channels last, in place.

    Folds (a) modules built like Detectron2's ``Conv2d``, with a 4-dimensional ``weight``, a
    ``bias`` and a ``norm`` applied right after the convolution, deformable ones too, and (b)
    convolutions with a normalisation after them in an ``nn.Sequential``, as torchvision's networks
    have them.  Other normalisations stay.  Results differ by rounding alone.

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
    module: Any
    for module in model.modules():
        if _foldable(module):
            _fold(module, module.norm)
            module.norm = None
        elif isinstance(module, nn.Sequential):
            _fold_neighbours(module)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _foldable(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return False
    if isinstance(module, nn.ConvTranspose2d) or not hasattr(module, "bias"):
        return False
    return _has_statistics(getattr(module, "norm", None))


def _has_statistics(norm: Any) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    # Without running statistics it normalises with those of the batch.
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _fold_neighbours(layers: nn.Sequential) -> None:
    for i in range(len(layers) - 1):
        # Exactly this class: others may do more than convolve.
        if type(layers[i]) is nn.Conv2d and _has_statistics(layers[i + 1]):
            _fold(layers[i], layers[i + 1])
            layers[i + 1] = nn.Identity()


def _fold(module: Any, norm: Any) -> None:
    """Give ``module`` the weights by which it computes ``norm(module(x))``."""
    # Only the parameters are new: this folds deformable convolutions too, and modules that share
    # weights may have different normalisations.
    dtype = module.weight.dtype
    weight, bias = fuse_conv_bn_weights(
        _double(module.weight),
        _double(module.bias),
        _double(norm.running_mean),
        _double(norm.running_var),
        norm.eps,
        _double(norm.weight),
        _double(norm.bias),
    )
    module.weight, module.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))


def _double(values: Any) -> Any:
    """Folding rounds once, at its end."""
    return None if values is None else values.double()
