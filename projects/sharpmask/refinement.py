"""Refinement modules: from the coarse mask of a window to one with every pixel (section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.projects.deepmask import SymmetricConv2d


class Refinement(nn.Module):
    """The top-down half of SharpMask.

    ::

        vector → linear → M1 (k, w, w)
        stage i = 1 ... 4:  M(i+1) = enlarge 2x (ReLU (V(Mi) + H(Fi)))     half the channels of Mi
        M5 (k/16, 16 w, 16 w) → 3x3 conv → logits

    F1 ... F4 are maps of the trunk, F1 the coarsest.  H is three convolutions that reduce the
    channels of such a map, V is two convolutions.  V(M) + H(F) is one convolution of both maps, so
    a stage is the paper's plain module, ``conv(concatenation)``, in two parts (section 3.1).  H(F)
    depends on the image alone and can be computed once for all windows.

    Deviation: masks are enlarged by repetition, as the released code does; the paper says
    bilinearly.  Convolutions start by He's rule, the sums V(M) + H(F) around 1 and the logits
    around 0.  The released code keeps Torch's default; with it values fade from layer to layer, and
    ReLU may silence the few channels of the last stage for good.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        window: int,
        feature_channels: Sequence[int],
        mask_dim: int,
        skip_dim: int,
        reduced_dims: Sequence[int],
    ) -> None:
        """
        Args:
            embedding_dim: of the vector of a window.
            window: w, cells of the coarsest map along the sides of a window.
            feature_channels: of the trunk's maps, coarsest first; each is twice as fine as the
                one before.
            mask_dim: k, channels of the coarsest mask.
            skip_dim: channels of H's second convolution in the first stage; halved with k.
            reduced_dims: channels of H's first convolution, for each stage.
        """
        super().__init__()
        self.window = window
        self.mask_dim = mask_dim
        self.start = nn.Linear(embedding_dim, mask_dim * window**2)
        horizontal, vertical = [], []
        for number, (channels, reduced) in enumerate(
            zip(feature_channels, reduced_dims, strict=True)
        ):
            width, skip = mask_dim >> number, skip_dim >> number
            horizontal.append(_convolutions(channels, reduced, skip, width // 2, bias=0.0))
            vertical.append(_convolutions(width, width, width // 2, bias=1.0))
        self.horizontal = nn.ModuleList(horizontal)
        self.vertical = nn.ModuleList(vertical)
        self.output = SymmetricConv2d(mask_dim >> len(horizontal), 1, 3)
        _start(self.output, 0.0)
        nn.init.normal_(self.output.weight, std=0.01)

    def skips(self, features: Sequence[Tensor]) -> list[Tensor]:
        """H of every stage, for maps of windows or of whole images."""
        return [net(x) for net, x in zip(self.horizontal, features, strict=True)]

    def forward(self, vectors: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Logits of N windows.

        Args:
            vectors: (N, E).
            skips: H of every stage, (N, k / 2^i, w 2^(i-1), w 2^(i-1)).
        Returns:
            (N, S, S) with S = w 2^(number of stages).
        """
        x = self.start(vectors).view(-1, self.mask_dim, self.window, self.window)
        for vertical, skip in zip(self.vertical, skips, strict=True):
            x = F.relu(vertical(x) + skip)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        logits: Tensor = self.output(x)[:, 0]
        return logits


def gather_windows(x: Tensor, cells: Tensor, side: int) -> Tensor:
    """Cut windows out of a map, zeros beyond it.

    Args:
        x: (C, H, W).
        cells: (N, 2) int64, rows and columns of the top-left cells, not negative.
        side: cells of a window.
    Returns:
        (N, C, side, side).
    """
    if not len(cells):
        return x.new_zeros(0, len(x), side, side)
    bottom, right = (cells.amax(dim=0) + side).tolist()
    height, width = x.shape[-2:]
    x = F.pad(x, (0, max(right - width, 0), 0, max(bottom - height, 0)))
    steps = torch.arange(side, device=x.device)
    rows, columns = (cells[:, axis, None] + steps for axis in (0, 1))
    return x[:, rows[:, :, None], columns[:, None]].transpose(0, 1)


def _convolutions(*channels: int, bias: float) -> nn.Sequential:
    """3x3 convolutions with ReLU between them, for a sum of two that starts around ``bias``."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(channels[:-2], channels[1:-1], strict=True):
        layers += [SymmetricConv2d(inputs, outputs, 3), nn.ReLU()]
        _start(layers[-2], 0.0)
    last = SymmetricConv2d(channels[-2], channels[-1], 3)
    _start(last, bias)
    with torch.no_grad():
        last.weight.mul_(0.5)
    return nn.Sequential(*layers, last)


def _start(convolution: nn.Module, bias: float) -> None:
    nn.init.kaiming_normal_(convolution.get_parameter("weight"), nonlinearity="relu")
    nn.init.constant_(convolution.get_parameter("bias"), bias)
