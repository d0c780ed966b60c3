"""Drops every barrier of the kernels, one at a time, and says whether a comparison finds it.

``python -m tests.emulate.barriers [OPERATOR ...]`` prints the rows of the table in docs/gpu.md.
"""

import os
import sys
from pathlib import Path

import torch

from tests.emulate.build import CSRC, Build
from tests.emulate.cases import OPERATORS
from tests.emulate.compare import differences
from tests.emulate.emulated import Emulated, load


def sources(name: str) -> list[Path]:
    """The kernels of an operator and what they include."""
    path = CSRC / name / f"{name}_cuda.cu"
    return [path, *(CSRC / header for header in Build().included(path.read_text()))]


def barriers(path: Path) -> list[str]:
    """``file:line`` of every barrier in a source."""
    lines = enumerate(path.read_text().splitlines(), 1)
    words = ("__syncthreads", ".sync()")
    return [f"{path.name}:{n}" for n, line in lines if any(word in line for word in words)]


def is_found(emulated: Emulated, name: str, barrier: str) -> bool:
    """Whether anything differs without the barrier, in a process of its own, which may crash."""
    child = os.fork()
    if child == 0:
        os._exit(any(differences(emulated, name, barrier)))
    return os.waitpid(child, 0)[1] != 0


def main(*names: str) -> None:
    torch.set_num_threads(1)
    emulated = load()
    for name in names or OPERATORS:
        for path in filter(barriers, sources(name)):
            missed = [b for b in barriers(path) if not is_found(emulated, name, b)]
            count = len(barriers(path))
            print(f"| `{name}` | `{path.name}` | {count - len(missed)} of {count} | {missed} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
