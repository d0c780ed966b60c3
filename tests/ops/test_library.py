"""Operators that are missing, old or compiled for something else are explained at once."""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import instseg
from instseg.ops import _library
from tests.conftest import load_module

MODULES = sorted(set(Path(_library.__file__).parent.glob("*.py")) - {Path(_library.__file__)})
BUILD = "pip install --no-build-isolation -e ."


class Missing(MetaPathFinder):
    """Lets every import of ``instseg._C`` fail."""

    def __init__(self, error: ImportError) -> None:
        self.error = error

    def find_spec(self, name, path, target=None):
        if name == "instseg._C":
            raise self.error


@pytest.fixture
def message_of_an_import_with(monkeypatch):
    """Gives the error of importing the operators with another ``instseg._C``, or with none."""

    def message_of(stand_in: ModuleType | ImportError) -> str:
        monkeypatch.delenv("INSTSEG_OPERATORS", raising=False)
        monkeypatch.delattr(instseg, "_C", raising=False)
        monkeypatch.delitem(sys.modules, "instseg._C", raising=False)
        if isinstance(stand_in, ImportError):
            monkeypatch.setattr(sys, "meta_path", [Missing(stand_in), *sys.meta_path])
        else:
            monkeypatch.setattr(instseg, "_C", stand_in, raising=False)
        with pytest.raises(ImportError) as error:
            load_module(Path(_library.__file__))
        return str(error.value)

    return message_of


def test_operators_compiled_for_another_python_are_named(message_of_an_import_with):
    if not list(Path(_library.__file__).parents[1].glob("_C.*")):
        pytest.skip("none are compiled: they run in Python, see test_in_python.py")
    message = message_of_an_import_with(ModuleNotFoundError())
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"not compiled for Python {running}, but as _C." in message


def test_operators_that_do_not_load_are_an_error_that_says_what_to_type(message_of_an_import_with):
    message = message_of_an_import_with(ImportError("undefined symbol: x"))
    assert "built for another torch" in message
    assert BUILD in message and "undefined symbol: x" in message


def test_operators_compiled_for_another_torch_are_an_error_that_names_both(
    message_of_an_import_with,
):
    stand_in = ModuleType("instseg._C")
    stand_in.torch_version = "1.2.3"
    message = message_of_an_import_with(stand_in)
    assert "compiled for torch 1.2.3" in message and torch.__version__ in message
    assert BUILD in message


def test_an_operator_that_an_old_build_lacks_is_an_error_that_says_what_to_type():
    with pytest.raises(ImportError, match="lack no_such_operator") as error:
        _library.operator("no_such_operator")
    assert BUILD in str(error.value)


def test_so_is_a_fake_kernel_for_an_operator_that_an_old_build_lacks():
    with pytest.raises(ImportError, match="lack no_such_operator, since they are old") as error:
        _library.register_fake("no_such_operator")
    assert BUILD in str(error.value)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_registers_fake_kernels_by_way_of_that_error(path):
    assert "torch.library.register_fake" not in path.read_text()


def test_a_gpu_tensor_for_operators_of_the_cpu_is_an_error_that_says_what_to_type(monkeypatch):
    monkeypatch.setattr(_library, "_C", SimpleNamespace(with_cuda=0))
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0")
    with pytest.raises(RuntimeError, match="psroi_pool: .* cuda:0 .* CPU alone") as error:
        _library.check_devices("psroi_pool", maps=tensor)
    assert "FORCE_CUDA=1" in str(error.value)


def test_a_gpu_that_the_kernels_were_not_compiled_for_is_an_error_that_says_what_to_type(
    monkeypatch,
):
    monkeypatch.setattr(
        _library, "_C", SimpleNamespace(with_cuda=1, can_run_on=lambda index: index)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    _library._can_run_on.cache_clear()
    other, current = (SimpleNamespace(is_cuda=True, device=torch.device("cuda", i)) for i in (0, 1))
    with pytest.raises(
        RuntimeError, match=r"psroi_pool: .* other GPUs than cuda:0, T4 of .* 7\.5"
    ) as error:
        _library.check_devices("psroi_pool", maps=other)
    assert "TORCH_CUDA_ARCH_LIST=7.5" in str(error.value) and BUILD in str(error.value)
    _library.check_devices("psroi_pool", maps=current)
    _library._can_run_on.cache_clear()


@pytest.mark.skipif(not _library.compiled(), reason="no operators are compiled")
def test_a_build_without_cuda_runs_on_no_gpu():
    if _library._C.with_cuda and torch.cuda.is_available():
        assert _library._C.can_run_on(0)
    else:
        assert not _library._C.can_run_on(0)
    with pytest.raises(TypeError):
        _library._C.can_run_on("0")
