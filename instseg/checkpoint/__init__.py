"""Weight files: reading them safely, writing them atomically, fitting them to models."""

from instseg.checkpoint.checkpointer import Checkpointer
from instseg.checkpoint.fit import Fit
from instseg.checkpoint.reading import read_weights
from instseg.checkpoint.writing import save_safetensors

__all__ = [
    "Checkpointer",
    "Fit",
    "read_weights",
    "save_safetensors",
]
