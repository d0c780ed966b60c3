"""Build of instseg: maps the folders and compiles ``csrc/``; all metadata is in ``pyproject.toml``.

The papers live in ``projects/``, the configurations in ``configs/`` and the shipped models in
``zoo/``, where a reader looks for them.  They are installed as ``instseg.projects.<paper>``,
``instseg.configs`` and ``instseg.zoo``.  ``csrc/`` becomes ``instseg._C``, always for the CPU, and
for CUDA with a GPU or ``FORCE_CUDA=1``.  ``INSTSEG_SANITIZE=1`` builds it with sanitizers (see
``make asan``).
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 6)
# Other commands (source distributions, queries) work without torch.
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
    """Stop with one sentence if the torch that this build sees is missing or too old."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = ""
    numbers = re.match(r"(\d+)\.(\d+)", torch_version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(
            f"instseg is built against an installed torch >= {oldest} and this build sees "
            f"{'torch ' + torch_version if torch_version else 'none'}: "
            "type `pip install torch==2.11.0 torchvision==0.26.0`, "
            "then `pip install --no-build-isolation -e .`"
        )


def folder_of_each_package() -> dict[str, str]:
    """Return package name -> folder, relative to this file."""
    folders = {
        name: name.replace(".", "/")
        for name in find_packages(str(ROOT), include=["instseg", "instseg.*"])
    }
    for name in find_packages(str(ROOT / "projects")):
        folders[f"instseg.projects.{name}"] = f"projects/{name.replace('.', '/')}"
    folders["instseg.configs"] = "configs"
    folders["instseg.zoo"] = "zoo"
    return folders


def cuda_toolkit() -> str | None:
    """Return the folder of the CUDA toolkit: the named one, the real nvcc's, or a PyPI wheel's.

    torch takes the folder of the ``nvcc`` on PATH, which is wrong if that is a link or a script.
    """
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return named
    if nvcc := shutil.which("nvcc"):
        plan = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        if real_folder := re.search(r"^#\$ _HERE_=(.+)$", plan.stderr, re.MULTILINE):
            return str(Path(real_folder[1]).parent)
    nvidia = find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        for nvcc in sorted(Path(folder).glob("*/bin/nvcc")):
            return str(nvcc.parent.parent)
    return None


def check_compiler() -> None:
    """Stop with one sentence if there is no C++ compiler."""
    compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"instseg compiles C++ operators and there is no compiler {compiler!r}: install one, "
            "on Debian with `apt-get install g++`, or name yours in the variable CXX"
        )


def extension() -> tuple[Extension, Any]:
    """Return ``instseg._C`` and the command that builds it."""
    check_compiler()
    toolkit = cuda_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # torch reads it during the next imports
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    forced = os.environ.get("FORCE_CUDA") == "1"
    if forced and not toolkit:
        sys.exit(
            "FORCE_CUDA=1 asks for CUDA operators and there is no nvcc: install the CUDA toolkit "
            f"{torch.version.cuda or ''} and put its nvcc on PATH, or name its folder in CUDA_HOME"
        )
    cuda = forced or (torch.cuda.is_available() and toolkit is not None)
    patterns = ["*.cpp", "*/*.cpp"] + (["*.cu", "*/*.cu"] if cuda else [])
    sources = sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in patterns
        for path in (ROOT / "csrc").glob(pattern)
    )
    if os.name == "nt":
        flags, link = ["/O2", "/openmp"], []
    else:
        # No fused multiply-add: products are rounded before sums, so that all devices agree.
        flags, link = ["-O3", "-ffp-contract=off"], []
        if sys.platform == "linux":
            flags.append("-fopenmp")
    if os.environ.get("INSTSEG_SANITIZE") == "1":
        sanitizers = [
            "-fsanitize=address,undefined,float-cast-overflow",
            "-fno-sanitize-recover=all",
        ]
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
        link += sanitizers
    return (CUDAExtension if cuda else CppExtension)(
        "instseg._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("INSTSEG_WITH_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        extra_link_args=link,
    ), BuildExtension


build: dict[str, Any] = {}
if BUILD_COMMANDS.intersection(sys.argv[1:]):
    check_torch()
    module, command = extension()
    build = {"ext_modules": [module], "cmdclass": {"build_ext": command}}

FOLDERS = folder_of_each_package()
setup(
    license="Apache-2.0",
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={
        "instseg": ["py.typed"],
        "instseg.configs": ["*.yaml", "*/*.yaml"],
        "instseg.zoo": ["*.json", "*.safetensors"],
    },
    **build,
)
