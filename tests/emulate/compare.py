"""Builds and compares the kernels of one operator: ``python -m tests.emulate.compare ...``.

It prints the first difference in each of several orders of threads, or what stops the kernels.  A
process of its own, because kernels with mistakes in them may write anywhere.
"""

import json
import sys
from collections.abc import Iterator

import torch

from tests.emulate.build import Build
from tests.emulate.cases import first_difference
from tests.emulate.emulated import Emulated

ORDERS = ((0, 0), (1, 3), (5, 2))
"""Order of threads and blocks, and the most blocks; see ``Emulated.threads``."""


def differences(emulated: Emulated, name: str, skipped: str = "") -> Iterator[str]:
    """What differs in each order, "" for nothing."""
    for order, most_blocks in ORDERS:
        with emulated.threads(order, most_blocks, skipped):
            try:
                yield first_difference(name, 1, emulated.operators, seed=order)
            except RuntimeError as error:  # the scheduler's, or that of a check of the operator
                yield str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, skipped, *edits = sys.argv[1:]
    # A mistake is built with its operator alone; a barrier is skipped in the library of all.
    pairs = tuple(zip(edits[::2], edits[1::2], strict=True))
    build = Build(edits=pairs, stems=(name,)) if pairs else Build()
    print(json.dumps(list(differences(Emulated(build.library()), name, skipped))))
