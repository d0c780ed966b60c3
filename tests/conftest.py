"""Fixtures shared by all tests: golden numbers, real data if there is any, seeds."""

import os

# Before torch is imported.  Two workers with a thread each use two cores better than one with two,
# and the last bits of a result may depend on the number.  A test about threads sets its own.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import gc
import importlib.util
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import setuptools  # noqa: F401 - torch's compiler wants its distutils loaded, not the old one
import torch
from hypothesis import settings

# Timings on a shared machine say nothing about correctness.
settings.register_profile("instseg", deadline=None, max_examples=25)
settings.register_profile("fuzz", settings.get_profile("instseg"), max_examples=10_000)
settings.load_profile("instseg")

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage among the half a million objects that are made here and stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real images (coco_mini, nuclei, photos); skips the test without one."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root or not (Path(root) / "coco_mini").is_dir():
        pytest.skip("needs real images: set DETECTRON2_DATASETS to a folder with coco_mini")
    return Path(root).resolve()


def load_module(path: Path) -> ModuleType:
    """Import a file that belongs to no package, such as the recipes beside golden numbers."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(actual: torch.Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that ``actual`` differs from a golden array by ``tolerance`` at most."""
    torch.testing.assert_close(
        actual.detach(), torch.from_numpy(np.asarray(expected)), rtol=0, atol=tolerance
    )


@pytest.fixture(scope="session")
def golden_weights() -> ModuleType:
    """``fill`` and ``image``, the deterministic stand-ins for weights and images."""
    return load_module(GOLDEN / "weights.py")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of tests have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def exported_as(shared_folder: Path) -> Callable[[str], Any]:
    """Gives a ``tests.support.exported.Case`` of a paper; tracing takes a quarter of a minute."""
    from tests.support.exported import Case

    return functools.cache(lambda paper: Case(paper, shared_folder / paper))


@pytest.fixture(scope="session")
def exported_video(shared_folder: Path) -> Any:
    """A ``tests.support.exported.VideoCase``."""
    from tests.support.exported import VideoCase

    return VideoCase(shared_folder / "video")
