"""Base of the meta-architectures that normalise images themselves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PixelModel(nn.Module):
    """A model that takes images of values 0..255.

    Attributes:
        pixel_mean, pixel_std: (3, 1, 1), not saved with the weights.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """
        Args:
            pixel_mean: subtracted from every channel.
            pixel_std: then divides every channel.
        """
        super().__init__()
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.pixel_mean.device

    def normalised(self, pixels: Tensor) -> Tensor:
        """(..., 3, h, w) values 0..255 on the model's device → what the network takes."""
        return (pixels - self.pixel_mean) / self.pixel_std

    def normalised_images(self, items: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The ``image`` (3, h, w) of each input of a batch, on the model's device."""
        return [self.normalised(item["image"].to(self.device, torch.float32)) for item in items]
