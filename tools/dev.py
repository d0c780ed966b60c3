"""Set up, test, check and demonstrate a checkout without ``make`` and without ``sh``.

python tools/dev.py setup | demo | test | test-configs | lint

``make`` calls this for the set-up; its other targets (``asan``, ``cuda``, ...) need ``sh``.
``TORCH_INDEX=URL`` in the environment is a further index with wheels of torch, such as
``https://download.pytorch.org/whl/cpu``.
"""

from __future__ import annotations  # an old Python must reach the line that refuses it

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / ".setup-done"
CONSTRAINT = ("--constraint", "constraints.txt")
EXTRAS = "convert,demo,export,fast-eval,hub,lint,microscopy,test,video"
# pip's metadata are written last: an environment whose creation was interrupted has none.
USABLE = (
    "import importlib.metadata as m, sys; m.version('pip'); sys.exit(sys.version_info < (3, 10))"
)
# Each worker takes half of the tests, in order, so that a module's fixtures are made once.
TWO_WORKERS = ("--numprocesses", "2", "--dist", "worksteal")


def python(*words: str) -> None:
    """Run Python of ``.venv``; ends this program with its status if it fails."""
    run(BIN / "python", *words)


def run(*words: object, **environment: str) -> None:
    """Run a command in the checkout; ends this program with its status if it fails."""
    status = subprocess.run(
        list(map(str, words)), cwd=ROOT, env={**os.environ, **environment}
    ).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)


def become(*words: str) -> None:
    """Go on as Python of ``.venv``, so that a signal or the end of ``make`` reaches that program.

    Windows has no such thing; there this program waits for it.
    """
    if os.name == "nt":
        python(*words)
    else:
        os.chdir(ROOT)
        os.execv(BIN / "python", [str(BIN / "python"), *words])


def pip_install(*words: str) -> None:
    """Install into ``.venv``, with the tested versions."""
    quiet = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    python(*quiet, *CONSTRAINT, *words)


def is_set_up() -> bool:
    """Whether nothing changed since the last set-up that was finished."""
    if not STAMP.exists():
        return False
    names = ("constraints.txt", "setup.py", "pyproject.toml", "instseg/install_detectron2.py")
    files = [ROOT / name for name in names]
    files += (ROOT / "csrc").rglob("*")
    return all(path.stat().st_mtime <= STAMP.stat().st_mtime for path in files)


def setup() -> None:
    """Install everything into ``.venv``, unless that is done; an interrupted one starts again."""
    if is_set_up():
        return
    STAMP.unlink(missing_ok=True)
    done = None
    if shutil.which(BIN / "python"):
        done = subprocess.run([BIN / "python", "-c", USABLE], cwd=ROOT, capture_output=True)
    if done is None or done.returncode:
        run(sys.executable, "-m", "venv", "--clear", VENV)
    print(
        f"setup: installing into {VENV.name} (the first time some minutes and 5 GB, most of it "
        "torch)",
        flush=True,
    )
    index = os.environ.get("TORCH_INDEX")
    pip_install(
        *(("--extra-index-url", index) if index else ()),
        *("ninja", "setuptools", "torch", "torchvision"),
    )
    pip_install("--no-build-isolation", "--editable", f".[{EXTRAS}]")
    python("instseg/install_detectron2.py", *CONSTRAINT)
    tell = "from instseg.ops._library import described; print('setup: operators', described())"
    python("-c", tell)
    STAMP.touch()


def lint() -> None:
    """Check style, types and workflows."""
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")
    sources = (path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file())
    run(BIN / "clang-format", "--dry-run", "--Werror", *sources)
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    if actionlint := shutil.which("actionlint"):  # no package index has it as a wheel
        run(actionlint)
    # Type checkers cannot follow setup.py's package_dir in place, hence the installed copy.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "typed", ignore_errors=True)
    words = ("--quiet", "--no-deps", "--no-build-isolation", "--target", "build/typed", ".")
    run(BIN / "python", "-m", "pip", "install", *words, INSTSEG_OPERATORS="python")
    run(BIN / "mypy", "-p", "instseg", MYPYPATH="build/typed")


def main(arguments: Sequence[str] | None = None) -> None:
    commands = {
        "setup": lambda: None,
        "demo": lambda: become("tools/demo.py"),
        "test": lambda: become("-m", "pytest", "tests", *TWO_WORKERS),
        "test-configs": lambda: become(
            "-m", "pytest", "tests/config/test_configs.py", "-m", "", *TWO_WORKERS
        ),
        "lint": lint,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=commands)
    command = parser.parse_args(arguments).command
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this may have an older one
        sys.exit(f"error: instseg needs Python 3.10 or newer, and {sys.executable} is older")
    setup()
    commands[command]()


if __name__ == "__main__":
    main()
