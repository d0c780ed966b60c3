"""Install what metadata cannot ask for: ``python -m instseg.install_detectron2``.

That is Detectron2, which is not on PyPI, and OpenCV, of which either package will do: an installed
one is used, and ``opencv-python-headless`` is installed where there is none.

An installed Detectron2 is used if it has all that instseg imports from it.  Otherwise the sources
of upstream commit 864913f0 are taken out of the PyPI wheel of LabGym, which carries them with
``detectron2.`` renamed to ``LabGym.detectron2.``, and repacked into a wheel of their own with
upstream's requirements.  Uses the standard library alone, because it runs before anything else is
installed.
"""

import argparse
import ast
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

COMMIT = "864913f0e57e87a75c8cc0c7d79ecbd774fc669b"
VERSION = f"0.6+{COMMIT[:8]}"
UPSTREAM = f"git+https://github.com/facebookresearch/detectron2.git@{COMMIT}"
CARRIER = "labgym==3.1.2"
CARRIER_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
CARRIER_PREFIX = "LabGym/"
OPENCV = "opencv-python-headless>=4.10.0.84"

REQUIREMENTS = (
    "Pillow>=7.1 black cloudpickle fvcore>=0.1.5,<0.1.6 hydra-core>=1.1 iopath>=0.1.7 matplotlib "
    "omegaconf>=2.1,<2.4 packaging pycocotools>=2.0.2 tabulate tensorboard termcolor>=1.1 "
    "tqdm>4.29.0 yacs>=0.1.8"
).split()
METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2 at upstream commit {COMMIT}, without compiled operators
Home-page: https://github.com/facebookresearch/detectron2
License: Apache-2.0
Requires-Python: >=3.7
""" + "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
WHEEL = "Wheel-Version: 1.0\nGenerator: instseg\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


class InstallError(Exception):
    """Why Detectron2 could not be installed, in one line."""


def installed_detectron2() -> str | None:
    """Return version and folder of the Detectron2 that ``import`` would find, or None.

    Raises:
        InstallError: it lacks something that instseg imports.
    """
    spec = find_spec("detectron2")
    # A folder that happens to be called detectron2, such as a clone, is found without an origin.
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    version_line = re.search(
        r'^__version__ = "(.+)"', Path(spec.origin).read_text("utf-8"), re.MULTILINE
    )
    description = (
        f"detectron2 {version_line[1] if version_line else 'of unknown version'} in {folder}"
    )
    lacking = [f"{module}.{name}" for module, name in needed() if not has(folder, module, name)]
    if lacking:
        more = f" and {len(lacking) - 1} more names" if len(lacking) > 1 else ""
        raise InstallError(
            f"{description} lacks {lacking[0]}{more}, which instseg needs: type `pip uninstall "
            "detectron2`, then `python -m instseg.install_detectron2`"
        )
    return description


def needed() -> list[tuple[str, str]]:
    """Return every (module, name) that the modules beside this one import from Detectron2."""
    here = Path(__file__).parent
    files = list(here.rglob("*.py"))
    if not any((here / "projects").glob("*/__init__.py")):  # a checkout has them beside instseg
        files += (here.parent / "projects").rglob("*.py")
    return sorted({pair for file in files for pair in _imports(file)})


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == (
            "detectron2"
        ):
            yield from ((str(node.module), alias.name) for alias in node.names)


def has(folder: Path, module: str, name: str) -> bool:
    """Whether Detectron2 in ``folder`` has ``module`` and the sources of it speak of ``name``."""
    path = folder.joinpath(*module.split(".")[1:])
    if path.is_dir():
        return (path / f"{name}.py").exists() or (path / name).is_dir() or name in _words(path)
    return path.with_suffix(".py").exists() and name in _words(path.with_suffix(".py"))


@cache
def _words(path: Path) -> frozenset[str]:
    """The words in a module, or in those of a package without the packages inside it."""
    files = path.glob("*.py") if path.is_dir() else [path]
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text("utf-8")))


def verify(file: Path, sha256: str) -> None:
    """Raise InstallError unless ``file`` exists and has this SHA-256."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read {file}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise InstallError(
            f"{file.name} ({len(content)} bytes) is not the expected file and is not used: "
            f"sha256 is {digest}, expected {sha256}; download it again, or use --source github"
        )


def upstream_files(carrier: Path) -> dict[str, bytes]:
    """Return path -> content of the ``detectron2`` package inside the LabGym wheel, names restored.

    Raises:
        InstallError: ``carrier`` is no zip file or holds no Detectron2.
    """
    package = f"{CARRIER_PREFIX}detectron2"
    try:
        with zipfile.ZipFile(carrier) as archive:
            files = {
                name.removeprefix(CARRIER_PREFIX): archive.read(name)
                for name in archive.namelist()
                if name.startswith(f"{package}/") and not name.endswith("/")
            }
    except zipfile.BadZipFile as error:
        raise InstallError(
            f"{carrier.name} ({carrier.stat().st_size} bytes) is not a wheel: {error}"
        ) from error
    if not files:
        raise InstallError(f"{carrier.name} holds no {package}")
    return {
        name: content.replace(b"LabGym.detectron2", b"detectron2")
        for name, content in files.items()
    }


def repack(carrier: Path, folder: Path, sha256: str = CARRIER_SHA256) -> Path:
    """Make the Detectron2 wheel from the LabGym wheel ``carrier``; return its path in ``folder``.

    The same input gives the same bytes.

    Raises:
        InstallError: ``carrier`` is not the file with this ``sha256``, or holds no Detectron2.
    """
    verify(carrier, sha256)
    files = upstream_files(carrier)
    info = f"detectron2-{VERSION}.dist-info"
    files |= {f"{info}/METADATA": METADATA.encode(), f"{info}/WHEEL": WHEEL.encode()}
    record = "".join(
        f"{name},sha256={record_hash(content)},{len(content)}\n" for name, content in files.items()
    )
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return wheel


def record_hash(content: bytes) -> str:
    """Return the SHA-256 in the spelling of a wheel's RECORD (URL-safe base64 without padding)."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def pip_command() -> list[str]:
    """Return the words that run pip: the installed one, or else the one that comes with Python.

    ``uv venv`` makes environments without pip.

    Raises:
        InstallError: there is neither.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    spec = find_spec("ensurepip")  # Debian leaves it out
    folders = spec.submodule_search_locations if spec else None
    bundled = [file for folder in folders or () for file in Path(folder).rglob("pip-*.whl")]
    if not bundled:
        raise InstallError(f"{sys.executable} has no pip; type: uv pip install pip")
    return [sys.executable, str(bundled[0] / "pip")]


def run_pip(purpose: str, arguments: Sequence[str]) -> None:
    """Run pip for this interpreter; raise InstallError with its reason in one line if it fails."""
    command = [*pip_command(), "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    # The most specific line: pip's summary, git's refusal or the exception of a build.
    reasons = (
        [line for line in lines if re.match(r"(ERROR|fatal|\w+Error): ", line)]
        or lines
        or ["no reason given"]
    )
    raise InstallError(f"pip could not {purpose} (exit status {done.returncode}): {reasons[-1]}")


def download(folder: Path) -> Path:
    """Download the LabGym wheel into ``folder``; return its path."""
    try:
        # LabGym refuses new interpreters, the Detectron2 in it does not.
        run_pip(
            f"download {CARRIER}",
            ["download", "--no-deps", "--ignore-requires-python", "-d", str(folder), CARRIER],
        )
    except InstallError as error:
        raise InstallError(
            f"{error}; without network, fetch that wheel elsewhere and pass --wheel FILE"
        ) from error
    return next(folder.glob("labgym-*"))


def install(source: str, wheel: Path | None, constraint: Path | None) -> list[str]:
    """Install what is missing; return the lines to print.

    Raises:
        InstallError: something cannot be installed, or the installed Detectron2 cannot be used.
    """
    options = ["install", *(["--constraint", str(constraint)] if constraint else [])]
    lines = [_install_detectron2(source, wheel, options)]
    if find_spec("cv2") is None:
        run_pip(f"install {OPENCV}", [*options, OPENCV])
        lines.append("installed opencv-python-headless")
    elif reason := _missing_library():
        # Over the files of opencv-python, which an extra may have brought.
        again = ["--no-deps", "--force-reinstall", OPENCV]
        run_pip(f"install {OPENCV}", [*options, *again])
        lines.append(f"installed opencv-python-headless, since OpenCV did not load ({reason})")
    return lines


def _missing_library() -> str:
    """Why the installed OpenCV does not load if a library of the system is missing, else "".

    Raises:
        InstallError: OpenCV does not load for another reason.
    """
    done = subprocess.run([sys.executable, "-c", "import cv2"], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if "cannot open shared object file" not in done.stderr:
        raise InstallError(f"OpenCV does not load: {reason}")
    return reason.removeprefix("ImportError: ")


def _install_detectron2(source: str, wheel: Path | None, options: Sequence[str]) -> str:
    if existing := installed_detectron2():
        return f"using {existing}"
    if source == "github":
        # Upstream's setup.py imports torch, which an isolated build would not see.
        run_pip(f"install {UPSTREAM}", [*options, "--no-build-isolation", UPSTREAM])
        return f"installed detectron2 from {UPSTREAM}"
    with tempfile.TemporaryDirectory() as folder:
        repacked = repack(wheel or download(Path(folder)), Path(folder))
        run_pip(f"install {repacked.name}", [*options, str(repacked)])
    return f"installed {repacked.name}"


def build_wheel(source: str, wheel: Path | None, folder: Path) -> str:
    """Write a wheel of Detectron2, for others to install or to serve; return the line to print.

    Raises:
        InstallError: it cannot be made.
    """
    if source == "github":
        words = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), UPSTREAM]
        run_pip(f"build {UPSTREAM}", words)
        return f"wrote a wheel of {UPSTREAM} into {folder}"
    with tempfile.TemporaryDirectory() as downloads:
        return f"wrote {repack(wheel or download(Path(downloads)), folder)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="install_detectron2",
        description="Install Detectron2 and OpenCV unless they are there.",
    )
    parser.add_argument(
        "--source", choices=["pypi", "github"], default="pypi", help="where to take it from"
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help=f"the {CARRIER} wheel, already downloaded"
    )
    parser.add_argument(
        "--build-wheel",
        type=Path,
        metavar="DIR",
        help="write a wheel there, which pip installs anywhere, and install nothing",
    )
    parser.add_argument(
        "--constraint", type=Path, metavar="FILE", help="pip constraints for its requirements"
    )
    options = parser.parse_args(arguments)
    if options.source == "github" and options.wheel:
        parser.error("--wheel goes with --source pypi")
    try:
        if options.build_wheel:
            print(build_wheel(options.source, options.wheel, options.build_wheel))
        else:
            print("\n".join(install(options.source, options.wheel, options.constraint)))
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
