"""Checks that a network gives finite numbers: damaged weights are an error, not an odd result."""

from torch import Tensor

from instseg.errors import CheckpointError


def check_finite(*outputs: Tensor) -> None:
    """Refuse outputs of a network that are not finite.

    Comparisons with NaN are false, so without this check a mask, or an image's whole result, would
    silently be empty.

    Raises:
        CheckpointError: NaN or infinity in one of ``outputs``.
    """
    if not all(bool(x.isfinite().all()) for x in outputs):
        raise CheckpointError(
            "the network gives values that are not finite; its weights are damaged or come from a "
            "training that diverged"
        )
