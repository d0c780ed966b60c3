"""Prediction in bfloat16: the network computes in it, what follows in single precision."""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

FLOAT32, BFLOAT16 = "float32", "bfloat16"
DTYPES = (FLOAT32, BFLOAT16)
"""Number types of ``MODEL.DTYPE_TEST``."""
AUTO = "auto"
"""Value that stands for one of them, see :mod:`instseg.inference.auto_precision`."""
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of processors, as Linux calls them, that compute in bfloat16; the last one is of ARM."""


def precision(dtype: str, device: str) -> AbstractContextManager[object]:
    """Inside, convolutions and fully connected layers compute in a number type.

    Args:
        dtype: one of :data:`DTYPES`.
        device: such as "cpu" or "cuda:0".
    """
    if dtype == FLOAT32:
        return nullcontext()
    if device == "cpu" and not has_bfloat16():
        _warn_slow()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def store_as_bfloat16(model: nn.Module) -> None:
    """Store the weights of the layers that compute in bfloat16 as such, in place.

    Without this, :func:`precision` would convert them for every image.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)


@cache
def cpuinfo() -> str | None:
    """Linux's description of the processor; None on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return None


def processor_flags() -> frozenset[str] | None:
    """Names of what the processor can do; None where the system does not tell."""
    text = cpuinfo()
    if text is None:
        return None
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(flag for line in lines for flag in line.partition(":")[2].split())


@cache
def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; True where that is unknown."""
    flags = processor_flags()
    return flags is None or not _INSTRUCTIONS.isdisjoint(flags)


@cache
def _warn_slow() -> None:
    logger.warning(
        "MODEL.DTYPE_TEST is bfloat16, for which this processor has no instructions "
        "(avx512_bf16 or amx_bf16): prediction takes longer than in float32 (said once)"
    )
