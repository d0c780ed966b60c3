"""``instseg --version``: what is installed, line by line."""

import argparse
import importlib
import json
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NoReturn

import instseg

DETECTRON2 = "not installed; type: python -m instseg.install_detectron2"


class Version(argparse.Action):
    """Prints :func:`lines` and ends the program."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, help="print what is installed, and end", **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print("\n".join(lines()))
        parser.exit()


def lines() -> list[str]:
    """instseg, Python, Detectron2 with its commit, torch with CUDA, the operators, OpenCV.

    A part that is missing or does not load has its line as well, which says why.
    """
    return [
        f"instseg {instseg.__version__} in {Path(instseg.__file__).parent}",
        f"Python {platform.python_version()} on {sys.platform}, {platform.machine()}",
        f"detectron2 {_detectron2()}",
        f"torch {_loaded(_torch)}",
        f"operators {_loaded(_operators)}",
        f"OpenCV {_loaded(lambda: str(importlib.import_module('cv2').__version__))}",
    ]


def _loaded(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except ImportError as error:
        return "not usable: " + " ".join(str(error).split())


def _detectron2() -> str:
    try:
        installed = distribution("detectron2")
    except PackageNotFoundError:
        return DETECTRON2
    return f"{installed.version}, commit {_commit(installed) or 'unknown'}"


def _commit(installed: Distribution) -> str | None:
    """The commit that pip or our wheel recorded."""
    record = json.loads(installed.read_text("direct_url.json") or "{}")
    local = re.search(r"\+([0-9a-f]{8,40})$", installed.version)
    return record.get("vcs_info", {}).get("commit_id") or (local and local[1])


def _torch() -> str:
    import torch

    if torch.version.cuda is None:
        return f"{torch.__version__}, without CUDA"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, CUDA {torch.version.cuda}, {', '.join(gpus) or 'no GPU'}"


def _operators() -> str:
    from instseg.ops._library import described

    return described()
