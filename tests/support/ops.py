"""Shared by the tests of all operators."""

import pytest
import torch

from instseg import _C

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(
            not (_C.with_cuda and torch.cuda.is_available()),
            reason="needs a GPU and operators compiled for CUDA",
        ),
    ],
)
DEVICES = ["cpu", CUDA]
