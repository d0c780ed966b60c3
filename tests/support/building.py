"""Builds of this repository, of a copy and by an interpreter with a stand-in for torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

from tests.conftest import ROOT

TORCH = "pip install torch==2.11.0 torchvision==0.26.0"
STAND_IN = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext

class CppExtension(Extension): pass
class CUDAExtension(Extension): pass

class BuildExtension(build_ext):
    def run(self): print(*[(type(e).__name__, e.sources) for e in self.extensions])
    def get_outputs(self): return []
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``cwd``; return its result with both streams as text."""
    variables = {**os.environ, **environment}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True)


def copy_of_the_sources(folder: Path) -> Path:
    """Copy what a build reads, so that it leaves nothing in the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("instseg", "projects", "configs", "csrc", "zoo", "docs", "tools"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    names = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile")
    for path in (ROOT / name for name in (*names, "constraints.txt", "train_net.py")):
        if path.exists():
            shutil.copy(path, folder / path.name)
    return folder


def files(wheel: Path) -> set[str]:
    """Return the names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path, name: str) -> str:
    """Return one file of a wheel's dist-info folder."""
    with zipfile.ZipFile(wheel) as archive:
        [path] = [path for path in archive.namelist() if path.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


def interpreter_with(torch: str | None, folder: Path) -> Path:
    """Make an interpreter that has setuptools and, by its metadata, this version of torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    [packages] = folder.glob("venv/lib/python*/site-packages")
    setuptools = find_spec("setuptools")
    assert setuptools and setuptools.origin
    for pattern in ("*distutils*", "pkg_resources", "setuptools*", "wheel*"):
        for path in Path(setuptools.origin).parents[1].glob(pattern):
            (packages / path.name).symlink_to(path)
    if torch:
        (packages / f"torch-{torch}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n"
        (packages / f"torch-{torch}.dist-info" / "METADATA").write_text(text)
    return folder / "venv" / "bin" / "python"


def stand_in_for_torch(packages: Path, command: str = STAND_IN) -> None:
    """Write a package ``torch`` with which nothing is compiled.

    Args:
        command: the text of ``torch.utils.cpp_extension``, by default one that prints the plan.
    """
    (packages / "torch" / "utils").mkdir(parents=True)
    (packages / "torch" / "__init__.py").write_text(
        "class cuda: is_available = staticmethod(lambda: False)\nclass version: cuda = '13.0'\n"
    )
    (packages / "torch" / "utils" / "__init__.py").touch()
    (packages / "torch" / "utils" / "cpp_extension.py").write_text(command)
