"""Build of instseg: maps the folders and compiles ``csrc/``; all metadata is in ``pyproject.toml``.

The papers live in ``projects/``, the configurations in ``configs/`` and the shipped models in
``zoo/``, where a reader looks for them.  They are installed as ``instseg.projects.<paper>``,
``instseg.configs`` and ``instseg.zoo``.  ``csrc/`` becomes ``instseg._C``, always for the CPU, and
for CUDA with a GPU or ``FORCE_CUDA=1``.  A build that sees no torch (pip isolates builds) or no
compiler makes a package without ``_C``, whose operators run in Python; with
``INSTSEG_OPERATORS=compiled`` or ``FORCE_CUDA=1`` it stops instead, and
``INSTSEG_OPERATORS=python`` asks for it.
``INSTSEG_SANITIZE=1`` builds with sanitizers (see ``make asan``).
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
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 6)
OLDEST_PYTHON = (3, 10)
INSTALL = (
    "type `pip install torch==2.11.0 torchvision==0.26.0`, "
    "then `pip install --no-build-isolation -e .`"
)
REPOSITORY = "https://github.com/instseg/instseg"
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


def compiles() -> bool:
    """Whether this build compiles the operators; stops with one sentence if it has to and cannot.

    A torch that is too old stops every build.
    """
    special = "1" in (os.environ.get("FORCE_CUDA"), os.environ.get("INSTSEG_SANITIZE"))
    wanted = os.environ.get("INSTSEG_OPERATORS") or ("compiled" if special else "")
    if wanted not in ("", "compiled", "python"):
        sys.exit(f"INSTSEG_OPERATORS is {wanted!r}; expected compiled or python")
    if wanted == "python":
        return False
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = ""
    numbers = re.match(r"(\d+)\.(\d+)", torch_version)
    oldest = ".".join(map(str, OLDEST_TORCH))
    if torch_version and (numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH):
        sys.exit(
            f"instseg needs torch >= {oldest} and this build sees torch {torch_version}: {INSTALL}"
        )
    compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "c++").split()[0]
    missing = ""
    if not torch_version:
        missing = (
            f"instseg compiles its operators against an installed torch >= {oldest} and this build "
            f"sees none: {INSTALL}"
        )
    elif shutil.which(compiler) is None:
        missing = (
            f"instseg compiles C++ operators and there is no compiler {compiler!r}: install one, "
            "on Debian with `apt-get install g++`, or name yours in the variable CXX"
        )
    if missing and wanted == "compiled":
        sys.exit(missing)
    if missing:
        print(f"The operators will run in Python, which is slower. {missing}", file=sys.stderr)
    return not missing


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


def extension() -> tuple[Extension, Any]:
    """Return ``instseg._C`` and the command that builds it."""
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
            link.append("-Wl,--strip-all")
    if os.environ.get("INSTSEG_SANITIZE") == "1":
        sanitizers = [
            "-fsanitize=address,undefined,float-cast-overflow",
            "-fno-sanitize-recover=all",
        ]
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
        link = sanitizers
    module = (CUDAExtension if cuda else CppExtension)(
        "instseg._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("INSTSEG_WITH_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        extra_link_args=link,
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def run(self) -> None:
            """Remove operators of earlier versions, which Python would prefer for their names."""
            remove_operators(ROOT if self.inplace else Path(self.build_lib), "_C.cp*")
            super().run()

    return module, Build


def remove_operators(folder: Path, pattern: str) -> None:
    """Remove what an earlier build left of the operators of ``instseg`` in ``folder``."""
    for file in (folder / "instseg").glob(pattern):
        file.unlink()


class WithoutOperators(build_py):
    """Leaves no operators of an earlier build where this one puts the package."""

    def run(self) -> None:
        remove_operators(ROOT if self.editable_mode else Path(self.build_lib), "_C.*")
        super().run()


class Metadata(egg_info):
    """Names the torch that the operators were compiled for, since they load into no other."""

    def run(self) -> None:
        minor = ".".join(version("torch").split(".")[:2])
        requirements = [
            re.sub(r"^torch>=.*", f"torch=={minor}.*", requirement)
            for requirement in self.distribution.install_requires
        ]
        self.distribution.install_requires = requirements
        self.distribution.metadata.install_requires = requirements
        super().run()


def long_description() -> str:
    """Return the README with the addresses of its files and images, as other sites show it."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\g<1>{REPOSITORY}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{REPOSITORY}/blob/main/", text)


build: dict[str, Any] = {"cmdclass": {"build_py": WithoutOperators}}
if BUILD_COMMANDS.intersection(sys.argv[1:]) and compiles():
    extension_module, command = extension()
    build = {
        "ext_modules": [extension_module],
        "cmdclass": {"build_ext": command, "egg_info": Metadata},
        "options": {"bdist_wheel": {"py_limited_api": f"cp3{OLDEST_PYTHON[1]}"}},
    }

FOLDERS = folder_of_each_package()
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={
        "instseg": ["py.typed"],
        "instseg.configs": ["*.yaml", "*/*.yaml"],
        "instseg.zoo": ["*.json", "*.safetensors"],
    },
    **build,
)
