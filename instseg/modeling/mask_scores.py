"""Models whose detections have a score for their mask beside the one for their class."""

from torch import nn


def gives_mask_scores(model: nn.Module) -> bool:
    """Whether detections of ``model`` have ``mask_scores`` (N,) beside ``scores``.

    A module of a model that adds them says so by its attribute ``gives_mask_scores = True``.
    """
    return any(getattr(module, "gives_mask_scores", False) for module in model.modules())
