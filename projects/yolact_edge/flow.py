"""From the features of a key frame to those of a later frame; shapes are for 550 pixels."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling import warp
from instseg.projects.yolact import conv, resized

_FLOW_UNIT = 8.0
"""Predicted flow of half an image, so that common motions are of the order of 1."""


class Motion(NamedTuple):
    """How the features of one level follow from those of the key frame, for a batch of B frames.

    Attributes:
        flow: (B, 2, h, w) offset to the place in the key frame, x then y; 8 is half the image.
        scale: (B, C, h, w) factor on the features at that place.
        bias: (B, C, h, w) added to them.
    """

    flow: Tensor
    scale: Tensor
    bias: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """(B, C, h, w) features of the key frame → those of the frame."""
        return warp(features, self.flow / _FLOW_UNIT) * self.scale + self.bias


def relative_flow(flow: Tensor) -> Tensor:
    """(B, 2, h, w) flow in pixels of the image → in the units of :class:`Motion`."""
    height, width = flow.shape[-2:]
    halves = flow.new_tensor([width, height]).view(2, 1, 1) / 2
    return flow * (_FLOW_UNIT / halves)


class FeatFlowNet(nn.Module):
    """Predicts the motion between two frames from their features at stride 8 (figure 4).

    ::

        L3 of frame, key frame (256, 69, 69) → reduce → (64, 69, 69) each → side by side (128, ...)
          → encoder: (64, 69, 69) → (128, 35, 35) → (256, 18, 18)
        (256, 18, 18) → motion of P5
          → upsampled, beside flow and (128, 35, 35) → (258, 35, 35) → motion of P4
          → upsampled, beside flow and (64, 69, 69) → (130, 69, 69) → motion of P3

    A leaky ReLU follows all 3x3 convolutions of the encoder.  An untrained network predicts no
    motion: flow 0, scale 1, bias 0.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        layers: Sequence[Sequence[int]],
    ) -> None:
        """
        Args:
            channels: of the pyramid.
            width: of the first stage of the encoder; each further one has twice as many.
            layers: channels of the layers inside each stage, in multiples of ``width``; beside
                them a stage has one more.
        """
        super().__init__()
        self.reduce = leaky_conv(channels, width)
        inputs = 2 * width
        stages = []
        for level, inside in enumerate(layers):
            sizes = [inputs, *(width * factor for factor in inside), width << level]
            stages.append(
                nn.Sequential(
                    *(
                        leaky_conv(sizes[i], sizes[i + 1], stride=1 if i or not level else 2)
                        for i in range(len(sizes) - 1)
                    )
                )
            )
            inputs = sizes[-1]
        self.encoder = nn.ModuleList(stages)
        # By level, finest first; the coarsest is the last one of the encoder.
        widths = [2 * (width << level) + 2 for level in range(len(layers) - 1)] + [inputs]
        self.predictors = nn.ModuleList(MotionPredictor(size, channels) for size in widths)
        self.up_features = nn.ModuleList(
            _plain_conv(widths[level + 1], width << level) for level in range(len(layers) - 1)
        )
        self.up_flow = nn.ModuleList(_plain_conv(2, 2) for _ in self.up_features)

    def forward(self, frame: Tensor, reference: Tensor, finest: int = 0) -> list[Motion]:
        """
        Args:
            frame: (B, width, h, w), L3 through :attr:`reduce`.
            reference: the same of the key frame.
            finest: first level wanted, 0 for P3.
        Returns:
            the motions of that level and all coarser ones, finest first.
        """
        x = torch.cat([frame, reference], dim=1)
        encoded = []
        for stage in self.encoder:
            x = stage(x)
            encoded.append(x)
        motions = [self.predictors[-1](x)]
        for level in reversed(range(finest, len(self.up_features))):
            skip = encoded[level]
            features = self.up_features[level](resized(x, skip))
            flow = self.up_flow[level](resized(motions[0].flow, skip))
            x = torch.cat([skip, features, flow], dim=1)
            motions.insert(0, self.predictors[level](x))
        return motions


class MotionPredictor(nn.Module):
    """(B, inputs, h, w) → the :class:`Motion` of a level."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.flow = nn.Conv2d(inputs, 2, 3, padding=1, bias=False)
        self.scale = nn.Conv2d(inputs, channels, 1)
        self.bias = nn.Conv2d(inputs, channels, 1)
        for value in self.parameters():
            nn.init.zeros_(value)
        assert self.scale.bias is not None
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor) -> Motion:
        return Motion(self.flow(x), self.scale(x), self.bias(x))


class Refinement(nn.Module):
    """Corrects features of a key frame by the frame itself (``SPA`` in the authors' code).

    A level x becomes x + leaky ReLU(3x3 convolution of x and L3 of the frame).
    """

    def __init__(self, levels: int, channels: int) -> None:
        """
        Args:
            levels: how many, neighbours in the pyramid.
            channels: of each.
        """
        super().__init__()
        self.convs = nn.ModuleList(leaky_conv(2 * channels, channels) for _ in range(levels))

    def forward(self, features: Sequence[Tensor], lateral: Tensor) -> list[Tensor]:
        """
        Args:
            features: (B, C, h, w) of every level, finest first.
            lateral: (B, C, h', w') L3 of the frame.
        """
        refined = []
        for layer, x in zip(self.convs, features, strict=True):
            lateral = resized(lateral, x)
            refined.append(x + layer(torch.cat([x, lateral], dim=1)))
        return refined


def leaky_conv(inputs: int, outputs: int, stride: int = 1) -> Conv2d:
    """3x3 convolution and leaky ReLU."""
    layer = conv(inputs, outputs, stride=stride)
    layer.activation = partial(F.leaky_relu, negative_slope=0.1)
    return layer


def _plain_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3 convolution without bias."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer
