"""ReSeg and the stacked recurrent hourglass of ``Wizaron/instance-segmentation-pytorch``.

Both give maps of the image's size and count instances.  ``coordinates`` adds three channels to the
input of the first part's convolutions, the counter and the recurrent layers: see
:func:`with_coordinates`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling import VGG
from instseg.projects.discriminative_loss.networks import Maps

COORDINATES = 3
"""Channels that :func:`with_coordinates` adds."""


def with_coordinates(x: Tensor) -> Tensor:
    """Put y, x (from -1 at the first to 1 at the last cell) and the radius before the channels.

    The radius is relative to the largest one.  A single row or column has y or x = -1.

    Args:
        x: (B, C, h, w).
    Returns:
        (B, 3 + C, h, w).
    """
    count, _, height, width = x.shape
    rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
    columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
    y, x_axis = torch.meshgrid(rows, columns, indexing="ij")
    radius = torch.hypot(y, x_axis)
    grid = torch.stack([y, x_axis, radius / radius.max()])
    return torch.cat([grid.expand(count, -1, -1, -1), x], dim=1)


class CoordinateConv(nn.Conv2d):
    """A convolution whose input includes the coordinates."""

    def __init__(self, inputs: int, outputs: int, size: int, padding: int) -> None:
        super().__init__(inputs + COORDINATES, outputs, size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, outputs, h, w)."""
        return super().forward(with_coordinates(x))

    @classmethod
    def like(cls, conv: nn.Conv2d) -> "CoordinateConv":
        """``conv`` with coordinates, whose weights start at 0."""
        new = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], int(conv.padding[0]))
        with torch.no_grad():
            new.weight[:, :COORDINATES] = 0
            new.weight[:, COORDINATES:] = conv.weight
            if new.bias is not None and conv.bias is not None:
                new.bias.copy_(conv.bias)
        return new


def conv3x3(inputs: int, outputs: int, coordinates: bool) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    if coordinates:
        return CoordinateConv(inputs, outputs, 3, 1)
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def vgg_features(last_stage: str, coordinates: bool) -> VGG:
    """VGG-16 up to ``last_stage`` with the outputs of all its stages."""
    stages = ("conv1", "conv2", "conv3")
    vgg = VGG(out_features=stages[: stages.index(last_stage) + 1])
    if coordinates:
        for index, layer in enumerate(vgg.features):
            if isinstance(layer, nn.Conv2d):
                vgg.features[index] = CoordinateConv.like(layer)
    return vgg


class ReNet(nn.Module):
    """Two recurrent layers, along the rows and then the columns (Visin et al., arXiv 1505.00393).

    ::

        (B, C, h, w) → GRU over each row, both ways → (B, 2 units, h, w)
          → GRU over each column, both ways → (B, 2 units, h, w)
    """

    def __init__(self, inputs: int, units: int, coordinates: bool) -> None:
        """
        Args:
            inputs: channels C.
            units: of each GRU in each direction.
            coordinates: of the input.
        """
        super().__init__()
        self.coordinates = coordinates
        inputs += COORDINATES if coordinates else 0
        self.horizontal = nn.GRU(inputs, units, batch_first=True, bidirectional=True)
        self.vertical = nn.GRU(2 * units, units, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, 2 units, h, w)."""
        if self.coordinates:
            x = with_coordinates(x)
        count, _, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(count * height, width, -1)
        swept = self.horizontal(rows)[0].view(count, height, width, -1)
        columns = swept.transpose(1, 2).reshape(count * width, height, -1)
        return self.vertical(columns)[0].view(count, width, height, -1).permute(0, 3, 2, 1)


class Counter(nn.Module):
    """Number of instances as a share of the largest one: four convolutions, mean, sigmoid.

    ::

        (B, C, h, w) → pool → conv1, conv2 (32) → pool → conv3, conv4 (32) → mean → linear → (B,)
    """

    def __init__(self, inputs: int, coordinates: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            conv3x3(channels, 32, coordinates) for channels in (inputs, 32, 32, 32)
        )
        self.linear = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w), h and w at least 4 → (B,) in 0..1."""
        for number, conv in enumerate(self.convs):
            if number % 2 == 0:
                x = F.max_pool2d(x, 2)
            x = conv(x).relu()
        return self.linear(x.mean(dim=(2, 3))).sigmoid()[:, 0]


class ReSeg(nn.Module):
    """ReSeg (Visin et al., CVPRW 2016, arXiv 1511.07053) with three outputs.

    ::

        image → VGG-16: conv1 (64, H, W), conv2 (128, H/2, W/2), conv3 (256, H/4, W/4)
          conv3 → renet1 → renet2 (200, H/4, W/4) → counter
          renet2 → up (100, H/2, W/2), conv2 → (228) → up (100, H, W), conv1 → (164, H, W) → heads
    """

    size_divisibility = 4
    min_size = 16

    def __init__(self, num_classes: int, embedding_dim: int, *, coordinates: bool) -> None:
        """
        Args:
            num_classes: C, without the background.
            embedding_dim: D.
            coordinates: see the module.
        """
        super().__init__()
        self.vgg = vgg_features("conv3", coordinates)
        self.renet1 = ReNet(256, 100, coordinates)
        self.renet2 = ReNet(200, 100, coordinates)
        self.up1 = nn.ConvTranspose2d(200, 100, 2, 2)
        self.up2 = nn.ConvTranspose2d(228, 100, 2, 2)
        self.semantic = nn.Conv2d(164, num_classes + 1, 1)
        self.embedding = nn.Conv2d(164, embedding_dim, 1)
        self.counter = Counter(200, coordinates)

    def forward(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps of stride 1."""
        features = self.vgg(images)
        swept = self.renet2(self.renet1(features["conv3"]))
        x = torch.cat([self.up1(swept).relu(), features["conv2"]], dim=1)
        x = torch.cat([self.up2(x).relu(), features["conv1"]], dim=1)
        return Maps(self.semantic(x), self.embedding(x), self.counter(swept))


class ConvGRU(nn.Module):
    """A gated recurrent unit whose products are 3x3 convolutions; state and input have C channels.

    ::

        r, u = sigmoid(gates [x, h]);  h' = u h + (1 - u) tanh(candidate [x, r h])
    """

    def __init__(self, channels: int, coordinates: bool) -> None:
        super().__init__()
        self.gates = conv3x3(2 * channels, 2 * channels, coordinates)
        self.candidate = conv3x3(2 * channels, channels, coordinates)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """(B, C, h, w) twice → the new state."""
        reset, update = self.gates(torch.cat([x, state], dim=1)).sigmoid().chunk(2, dim=1)
        candidate = self.candidate(torch.cat([x, reset * state], dim=1)).tanh()
        return update * state + (1 - update) * candidate


class RecurrentHourglass(nn.Module):
    """Three steps of one ConvGRU and back again with skips; the size stays.

    ::

        x → pre0 → pre1 → pre2, each feeding the GRU: states h1, h2, h3
        h3 → post2 → + h2 → post1 → + h1 → post0
    """

    def __init__(self, channels: int, coordinates: bool) -> None:
        super().__init__()
        self.pre = nn.ModuleList(conv3x3(channels, channels, coordinates) for _ in range(3))
        self.gru = ConvGRU(channels, coordinates)
        self.post = nn.ModuleList(conv3x3(channels, channels, coordinates) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same."""
        state = torch.zeros_like(x)
        states = []
        for conv in self.pre:
            x = conv(x).relu()
            state = self.gru(x, state)
            states.append(state)
        y = self.post[2](states[2]).relu()
        for step in (1, 0):
            y = self.post[step](y + states[step]).relu()
        return y


class StackedRecurrentHourglass(nn.Module):
    """Two recurrent hourglasses, two ReNets, a decoder (after arXiv 1806.02070), three outputs.

    ::

        image → VGG-16 conv1 (64, H, W) → hourglass1 → pool → hourglass2 → pool (64, H/4, W/4)
          → renet1 → renet2 → up1 → up2 (64, H, W) → heads, counter
    """

    size_divisibility = 4
    min_size = 4

    def __init__(self, num_classes: int, embedding_dim: int, *, coordinates: bool) -> None:
        """
        Args:
            num_classes: C, without the background.
            embedding_dim: D.
            coordinates: see the module.
        """
        super().__init__()
        channels = 64
        self.vgg = vgg_features("conv1", coordinates)
        self.hourglass1 = RecurrentHourglass(channels, coordinates)
        self.hourglass2 = RecurrentHourglass(channels, coordinates)
        self.renet1 = ReNet(channels, channels // 2, coordinates)
        self.renet2 = ReNet(channels, channels // 2, coordinates)
        self.up1 = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.up2 = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.semantic = nn.Conv2d(channels, num_classes + 1, 1)
        self.embedding = nn.Conv2d(channels, embedding_dim, 1)
        self.counter = Counter(channels, coordinates)

    def forward(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps of stride 1."""
        x = self.vgg(images)["conv1"]
        x = F.max_pool2d(self.hourglass1(x), 2)
        x = F.max_pool2d(self.hourglass2(x), 2)
        x = self.renet2(self.renet1(x))
        x = self.up2(self.up1(x).relu()).relu()
        return Maps(self.semantic(x), self.embedding(x), self.counter(x))
