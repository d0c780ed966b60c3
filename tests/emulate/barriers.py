"""Drops every barrier of the kernels, one at a time: ``python -m tests.emulate.barriers``."""

import sys
from pathlib import Path

from tests.emulate.build import CSRC
from tests.emulate.test_emulator import compare

WORDS = ("__syncthreads", ".sync()")


def main(*names: str) -> None:
    for path in sorted(CSRC.rglob("*_cuda.cu")):
        if names and path.parent.name not in names:
            continue
        for source in (path, *HEADERS.get(path.parent.name, ())):
            for number, line in enumerate(source.read_text().splitlines(), 1):
                if any(word in line for word in WORDS):
                    found = compare(path.parent.name, f"{source.name}:{number}")
                    print(path.parent.name, f"{source.name}:{number}", bool(any(found)), flush=True)


HEADERS: dict[str, tuple[Path, ...]] = {
    "psroi_pool": (CSRC / "psroi_pool" / "bin_table.cuh", CSRC / "ordered_list.cuh"),
}
"""Whose barriers are dropped too, with the operator that shows what comes of it."""

if __name__ == "__main__":
    main(*sys.argv[1:])
