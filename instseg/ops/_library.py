"""Loads the compiled operators, ``torch.ops.instseg``, or defines them in Python.

Where none are compiled, or ``INSTSEG_OPERATORS`` is ``python``, each operator is a composition of
torch's, registered by :func:`in_python`.  Compiled ones that do not load are an error that says
what to type.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import instseg.forks  # noqa: F401 - gives up the threads of operators before a fork
from instseg.ops._schemas import SCHEMAS

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

_BUILD = "type `pip install --no-build-isolation -e .` in the folder of setup.py"


def _load() -> Any:
    """The module of the compiled operators; None if there is none or Python is asked for.

    Raises:
        ImportError: they were compiled for another torch or another Python.
    """
    if os.environ.get("INSTSEG_OPERATORS") == "python":
        return None
    try:
        from instseg import _C
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            others = ", ".join(file.name for file in Path(__file__).parent.parent.glob("_C.*"))
            if not others:
                return None
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise ImportError(
                f"the operators of instseg are not compiled for Python {version}, but as {others}: "
                f"{_BUILD}"
            ) from None
        raise ImportError(
            "the compiled operators of instseg do not load, most likely because they were built "
            f"for another torch than {torch.__version__}: {_BUILD} ({error})"
        ) from None
    if _C.torch_version != torch.__version__.partition("+")[0]:
        raise ImportError(
            f"the operators of instseg were compiled for torch {_C.torch_version} and this is "
            f"{torch.__version__}: {_BUILD}"
        )
    return _C


_C = _load()
_definitions = torch.library.Library("instseg", "DEF" if _C is None else "FRAGMENT")
if _C is None:
    for _name, _schema in SCHEMAS.items():
        _definitions.define(_name + _schema)


def compiled() -> bool:
    """Whether the operators are compiled; otherwise they run in Python."""
    return _C is not None


def described() -> str:
    """Where the operators run, for ``instseg --version``."""
    if _C is None:
        return f"in Python, slower: {_BUILD}"
    return f"compiled for torch {_C.torch_version}, {'CPU and CUDA' if _C.with_cuda else 'CPU'}"


def in_python(name: str) -> Callable[[Function], Function]:
    """Decorates a function that computes an operator where none are compiled, on any device."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def kernel(*arguments: Any) -> Any:
            _tell()
            # A compiled operator computes in the number types of its arguments.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*arguments)

        if _C is None:
            _definitions.impl(name, kernel, "CompositeExplicitAutograd")
        return function

    return register


@cache
def _tell() -> None:
    logger.warning(f"the operators of instseg run {described()}")


def expect(holds: bool, message: str, kind: type[Exception] = ValueError) -> None:
    """Raise ``kind`` with a message unless something ``holds``."""
    if not holds:
        raise kind(message)


def sum_dtype(values: Tensor) -> torch.dtype:
    """In what operators add up ``values``: float64 as it is, everything else in float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_roi_values(op: str, rois: Tensor, images: int) -> None:
    """Refuse RoIs (R, 5) with a batch index that is no image, or a coordinate that is not finite.

    Raises:
        IndexError, ValueError: naming the operator.
    """
    batch = rois[:, 0]
    whole = (batch >= 0) & (batch < images) & (batch.floor() == batch)
    message = f"{op}: a batch index is no whole number from 0 to {images - 1}"
    expect(bool(whole.all()), message, IndexError)
    expect(bool(rois.isfinite().all()), f"{op}: rois has a coordinate that is not finite")


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
    if _C is None:
        return
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
