"""Convolutions whose border mirrors the image."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _SymmetricPad(torch.autograd.Function):
    """See :func:`symmetric_pad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, margin: int) -> Tensor:
        ctx.margin = margin
        if margin == 1:  # the same result, faster
            return F.pad(x, (1, 1, 1, 1), mode="replicate")
        rows, columns = (_mirrored(length, margin, x.device) for length in x.shape[-2:])
        return x.index_select(2, rows).index_select(3, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        margin = ctx.margin
        return grad[:, :, margin:-margin, margin:-margin], None


def symmetric_pad(x: Tensor, margin: int) -> Tensor:
    """Mirror ``x`` at its border, the edge included: ``c b a | a b c`` (NumPy's "symmetric").

    Gradients treat the added cells as constants, as in the released code.

    Args:
        x: (B, C, H, W), not empty.
        margin: cells added on every side, at least 1; may be more than H or W.
    Returns:
        (B, C, H + 2 margin, W + 2 margin).
    """
    padded: Tensor = _SymmetricPad.apply(x, margin)
    return padded


class SymmetricConv2d(nn.Conv2d):
    """A convolution with an odd kernel that pads its input by mirroring half a kernel."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True
    ) -> None:
        """
        Args:
            inputs, outputs: channels.
            kernel: its side, odd and more than 1.
            stride: of both directions.
            bias: whether it adds one.
        """
        super().__init__(inputs, outputs, kernel, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(symmetric_pad(x, self.kernel_size[0] // 2))


def _mirrored(length: int, margin: int, device: torch.device) -> Tensor:
    """Index of the source of each cell of a padded row of ``length`` cells."""
    steps = torch.arange(-margin, length + margin, device=device) % (2 * length)
    return torch.minimum(steps, 2 * length - 1 - steps)
