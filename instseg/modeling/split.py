"""Models whose prediction is a network of fixed shape, tensors in and tensors out, and the rest.

The network can be compiled and exported as one graph; what follows depends on the data.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from instseg.errors import ConfigError


@runtime_checkable
class SplitModel(Protocol):
    """What a meta-architecture declares to be compiled and exported.

    ``model(inputs)`` must equal ``model.postprocess(model.raw(model.preprocess(inputs)), inputs)``.

    Attributes:
        raw_names: names of the outputs of :meth:`raw`.
    """

    raw_names: tuple[str, ...]

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        """Detectron2's inputs → what the network takes, the same shape for all pictures."""

    def raw(self, images: Tensor) -> tuple[Tensor, ...]:
        """The network: tensors with the batch first, no control flow that depends on values."""

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Outputs of the network → Detectron2's results."""

    def extra_networks(self) -> dict[str, Tensor]:
        """Children that :meth:`postprocess` calls, by name, with an input of two rows for each.

        They take and give one tensor, any number of rows, and are exported to files of their own.
        """


class Network(nn.Module):
    """``model.raw`` as a module."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.raw(images)


def as_split(model: nn.Module, purpose: str) -> SplitModel:
    """``model`` itself if it declares its network.

    Args:
        model: any meta-architecture.
        purpose: what for, in the error: "compiled", "exported".
    Raises:
        ConfigError: it does not.
    """
    if isinstance(model, SplitModel):
        return model
    raise ConfigError(
        f"{type(model).__name__} cannot be {purpose}: it declares no network of fixed shape "
        "(see instseg.modeling.SplitModel); YOLACT, YOLACT++ and YolactEdge do"
    )
