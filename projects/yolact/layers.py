"""The parts of YOLACT's network after the backbone; all shapes are for images of 550 pixels."""

from collections.abc import Sequence

import torch
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torch.nn import functional as F


def conv(
    inputs: int,
    outputs: int,
    size: int = 3,
    *,
    stride: int = 1,
    norm: str = "",
    relu: bool = False,
) -> Conv2d:
    """Convolution that keeps the number of cells (or halves it), initialised as the authors'.

    Weights are Xavier-uniform; the bias is zero and there only without a normalisation.
    """
    layer = Conv2d(
        inputs,
        outputs,
        size,
        stride=stride,
        padding=size // 2,
        bias=not norm,
        norm=get_norm(norm, outputs),
        activation=F.relu if relu else None,
    )
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class FeaturePyramid(nn.Module):
    """YOLACT's FPN: bilinear top-down path, ReLU on P3..P5, P6 and P7 from P5 (section 4.1).

    ::

        C5 → lateral5 ──────────→ S5 → output5 + ReLU → P5 (256, 18, 18)
        C4 → lateral4 → + up(S5) → S4 → output4 + ReLU → P4 (256, 35, 35)
        C3 → lateral3 → + up(S4) → S3 → output3 + ReLU → P3 (256, 69, 69)
        P5 → downsample6 → P6 (256, 9, 9) → downsample7 → P7 (256, 5, 5)
    """

    strides = (8, 16, 32, 64, 128)

    def __init__(self, in_channels: Sequence[int], channels: int, norm: str) -> None:
        """
        Args:
            in_channels: of C3, C4, C5.
            channels: of every output.
            norm: Detectron2's name of a normalisation, "" for none.
        """
        super().__init__()
        self.lateral3, self.lateral4, self.lateral5 = (
            conv(inputs, channels, 1, norm=norm) for inputs in in_channels
        )
        self.output3, self.output4, self.output5 = (
            conv(channels, channels, norm=norm, relu=True) for _ in in_channels
        )
        self.downsample6 = conv(channels, channels, stride=2, norm=norm)
        self.downsample7 = conv(channels, channels, stride=2, norm=norm)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C3, C4, C5 → P3, P4, P5, P6, P7."""
        return self.outputs(self.top_down(self.laterals(features)))

    def laterals(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C3, C4, C5, or the first of them → (B, channels, ...) each."""
        layers = (self.lateral3, self.lateral4, self.lateral5)
        return [layer(x) for layer, x in zip(layers, features, strict=False)]

    def top_down(self, laterals: Sequence[Tensor], coarser: Tensor | None = None) -> list[Tensor]:
        """Add to every level what lies above it.

        Args:
            laterals: of any number of neighbouring levels, finest first.
            coarser: the sum S of the level above them; None if the last of them is the coarsest.
        Returns:
            the sums S of the levels of ``laterals``.
        """
        sums: list[Tensor] = []
        for lateral in reversed(laterals):
            coarser = lateral if coarser is None else lateral + resized(coarser, lateral)
            sums.insert(0, coarser)
        return sums

    def outputs(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """S3, S4, S5 → P3, P4, P5, P6, P7."""
        s3, s4, s5 = sums
        p5 = self.output5(s5)
        p6 = self.downsample6(p5)
        return [self.output3(s3), self.output4(s4), p5, p6, self.downsample7(p6)]


def resized(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with as many cells as ``like``, bilinear."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class ProtoNet(nn.Module):
    """Makes the prototype masks of a whole image from P3 (section 3.1, figure 3).

    ::

        P3 (256, 69, 69) → 3x3 convolutions + ReLU → bilinear x2 → (256, 138, 138)
          → 3x3 convolution + ReLU → 1x1 convolution + ReLU → (138, 138, 32)
    """

    def __init__(self, channels: int, num_convs: int, num_prototypes: int, norm: str) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(conv(channels, channels, norm=norm, relu=True) for _ in range(num_convs))
        )
        self.upsampled = conv(channels, channels, norm=norm, relu=True)
        self.predictor = conv(channels, num_prototypes, 1, relu=True)

    def forward(self, p3: Tensor) -> Tensor:
        """(B, channels, h, w) → (B, 2h, 2w, num_prototypes), none below 0."""
        x = self.convs(p3)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        prototypes: Tensor = self.predictor(self.upsampled(x))
        return prototypes.permute(0, 2, 3, 1)


class PredictionHead(nn.Module):
    """Classes, boxes and mask coefficients of all anchors, one set of weights for all levels.

    A 3x3 convolution with ReLU is shared by three 3x3 convolutions (section 3.1, figure 4).
    """

    def __init__(
        self,
        num_classes: int,
        num_anchors: int,
        num_prototypes: int,
        channels: int,
        norm: str,
    ) -> None:
        """
        Args:
            num_classes: foreground classes.
            num_anchors: per cell.
            num_prototypes: coefficients per anchor.
            channels: of every level.
            norm: of the shared convolution.  The levels differ in their statistics, so a batch
                normalisation would predict with others than it trained with: choose GN.
        """
        super().__init__()
        self.shared = conv(channels, channels, norm=norm, relu=True)
        self.box_deltas = conv(channels, num_anchors * 4)
        self.class_logits = conv(channels, num_anchors * (num_classes + 1))
        self.mask_coefficients = conv(channels, num_anchors * num_prototypes)
        self.widths = 4, num_classes + 1, num_prototypes

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            pyramid: P3..P7, each (B, channels, h, w).
        Returns:
            box deltas (B, P, 4), class logits (B, P, num_classes + 1) with the background first,
            and coefficients (B, P, num_prototypes) in -1..1; for the order of the P anchors see
            :func:`~instseg.projects.yolact.boxes.make_priors`.
        """
        shared = [self.shared(level) for level in pyramid]
        deltas, logits, coefficients = (
            torch.cat([_by_anchor(layer(x), width) for x in shared], dim=1)
            for layer, width in zip(
                (self.box_deltas, self.class_logits, self.mask_coefficients),
                self.widths,
                strict=True,
            )
        )
        return deltas, logits, coefficients.tanh()


class HeadByLevel(nn.ModuleList):
    """A :class:`PredictionHead` of its own for every level, in place of one for all."""

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`PredictionHead`."""
        outputs = [head([level]) for head, level in zip(self, pyramid, strict=True)]
        deltas, logits, coefficients = (torch.cat(x, dim=1) for x in zip(*outputs, strict=True))
        return deltas, logits, coefficients


def _by_anchor(x: Tensor, width: int) -> Tensor:
    """(B, A * width, h, w) → (B, h * w * A, width)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)
