"""Build of instseg: checks torch, maps the folders; all metadata is in ``pyproject.toml``.

The papers live in ``projects/`` and the configurations in ``configs/``, where a reader looks for
them, and are installed as ``instseg.projects.<paper>`` and ``instseg.configs``.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import find_packages, setup

OLDEST_TORCH = (2, 6)
# What makes no use of torch (source distributions, queries) works without it.
BUILD_COMMANDS = {
    "bdist_wheel",
    "build",
    "build_ext",
    "develop",
    "dist_info",
    "editable_wheel",
    "install",
}


def check_torch() -> None:
    """Stop with one sentence when the torch that this build sees is missing or too old."""
    try:
        found = version("torch")
    except PackageNotFoundError:
        found = ""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(
            f"instseg is built against an installed torch >= {oldest} and this build sees "
            f"{'torch ' + found if found else 'none'}: "
            "type `pip install torch==2.11.0 torchvision==0.26.0`, "
            "then `pip install --no-build-isolation -e .`"
        )


def folder_of_each_package() -> dict[str, str]:
    """Return package name -> folder, relative to this file."""
    root = Path(__file__).parent
    folders = {
        name: name.replace(".", "/")
        for name in find_packages(str(root), include=["instseg", "instseg.*"])
    }
    for name in find_packages(str(root / "projects")):
        folders[f"instseg.projects.{name}"] = f"projects/{name.replace('.', '/')}"
    folders["instseg.configs"] = "configs"
    return folders


if BUILD_COMMANDS.intersection(sys.argv[1:]):
    check_torch()

FOLDERS = folder_of_each_package()
setup(
    license="Apache-2.0",
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={"instseg": ["py.typed"], "instseg.configs": ["*.yaml", "*/*.yaml"]},
)
