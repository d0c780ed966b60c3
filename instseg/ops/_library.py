"""Loads the compiled operators, ``torch.ops.instseg``, and says what to type if that fails."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import instseg.forks  # noqa: F401 - gives up the threads of operators before a fork

_BUILD = "type `pip install --no-build-isolation -e .` in the folder of setup.py"

try:
    from instseg import _C
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
        others = ", ".join(file.name for file in Path(__file__).parent.parent.glob("_C.*"))
        version = f" for Python {sys.version_info.major}.{sys.version_info.minor}, but as {others}"
        raise ImportError(
            f"the operators of instseg are not compiled{version if others else ''}: {_BUILD}"
        ) from None
    raise ImportError(
        "the compiled operators of instseg do not load, most likely because they were built for "
        f"another torch than {torch.__version__}: {_BUILD} ({error})"
    ) from None

if _C.torch_version != torch.__version__.partition("+")[0]:
    raise ImportError(
        f"the operators of instseg were compiled for torch {_C.torch_version} and this is "
        f"{torch.__version__}: {_BUILD}"
    )


def operator(name: str) -> Any:
    """``torch.ops.instseg.<name>``.

    Raises:
        ImportError: the compiled operators are older than the Python code beside them.
    """
    if not hasattr(torch.ops.instseg, name):
        raise ImportError(
            f"the compiled operators of instseg lack {name}, since they are old: {_BUILD}"
        )
    return getattr(torch.ops.instseg, name).default


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torch.library.register_fake`` for an operator of instseg, which must have been compiled.

    Raises:
        ImportError: see :func:`operator`.
    """
    operator(name)
    decorate: Callable[..., Any] = torch.library.register_fake(f"instseg::{name}")
    return decorate


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors on several devices, or on a GPU if the operators know only the CPU.

    The kernels compare devices as well, but one tensor of the meta device is enough for torch to
    run the fake kernel, which returns memory that nobody has written.

    Raises:
        RuntimeError: naming the operator, the tensors and their devices.
    """
    (first_name, first), *others = [(k, v) for k, v in tensors.items() if v is not None]
    for name, tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(
                f"{op}: {first_name} is on {first.device} and {name} on {tensor.device}; move one "
                "of them"
            )
    if first.is_cuda and not _C.with_cuda:
        raise RuntimeError(
            f"{op}: the tensors are on {first.device} and instseg was compiled for the CPU alone; "
            f"with the CUDA toolkit installed and FORCE_CUDA=1 set, {_BUILD}"
        )
    # Inside a compiled graph the kernel itself reports it, less clearly.
    if first.is_cuda and not torch.compiler.is_compiling() and not _can_run_on(first.device.index):
        major, minor = torch.cuda.get_device_capability(first.device)
        raise RuntimeError(
            f"{op}: instseg was compiled for other GPUs than {first.device}, "
            f"{torch.cuda.get_device_name(first.device)} of compute capability {major}.{minor}; "
            f"with TORCH_CUDA_ARCH_LIST={major}.{minor} and FORCE_CUDA=1 set, {_BUILD}"
        )


@cache
def _can_run_on(index: int) -> bool:
    return bool(_C.can_run_on(index))
