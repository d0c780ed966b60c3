"""Models that spend less on some frames of a video than on others."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class VideoModel(Protocol):
    """What a meta-architecture declares whose frames share work.

    A key frame is computed in full and leaves a state behind; frames until the next one are
    computed with its help.  The state is tensors with the batch first, as images and outputs are,
    and means nothing to the caller; frames of different size never share one.  Calling the model
    itself computes every frame in full::

        outputs, state = model.keyframe(model.preprocess(inputs))
        outputs = model.between(model.preprocess(next_inputs), state)
        results = model.postprocess(outputs, next_inputs)

    Attributes:
        keyframe_interval: frames from one key frame to the next, at least 1.
    """

    keyframe_interval: int

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        """Detectron2's inputs → what the network takes, the same shape for all pictures."""

    def keyframe(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A frame in full → outputs of the network, and the state for the frames after it."""

    def between(self, images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A frame after the key frame that left ``state`` → outputs; the state stays as it is."""

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Outputs of the network → Detectron2's results."""


def as_video(model: nn.Module) -> VideoModel | None:
    """``model`` itself if its frames share work, else None."""
    return model if isinstance(model, VideoModel) else None
