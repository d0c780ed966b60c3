"""Writes weights as a safetensors file."""

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from instseg.files import atomic_write


def save_safetensors(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write weights as a safetensors file, atomically.

    Args:
        path: the file to write; the extension ``.safetensors`` tells the reader its format.
        state_dict: tensors on any device; they may share memory and be non-contiguous.
        metadata: JSON values that :func:`read_weights` gives back beside ``"model"``.
    """
    if metadata and "model" in metadata:
        raise ValueError("metadata cannot hold 'model', the key of the weights")
    # Cloned, since the format refuses tensors that share memory or are not contiguous.
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in state_dict.items()
    }
    header = {"instseg": json.dumps(dict(metadata or {}))}
    atomic_write(path, lambda file: file.write(safetensors.torch.save(tensors, header)))
