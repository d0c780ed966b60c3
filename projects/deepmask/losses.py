"""The logistic losses of masks and scores (section 3, equation 1)."""

from torch import Tensor
from torch.nn import functional as F


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over patches of the mean over pixels of log(1 + exp(-target * logit)).

    Args:
        logits: (B, S, S).
        targets: (B, S, S), -1 or 1.
    Returns:
        scalar.
    """
    return F.softplus(-targets * logits.float()).mean(dim=(1, 2)).sum()


def score_loss(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """``weight`` times the sum over patches of log(1 + exp(-label * logit)).

    Args:
        logits, labels: (B,), labels are -1 or 1.
        weight: lambda of equation 1, 1/32.
    Returns:
        scalar.
    """
    return weight * F.softplus(-labels * logits.float()).sum()
