"""Mistakes in kernels are found by running them on the CPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.emulate.barriers import barriers
from tests.emulate.build import COMPILE_SECONDS, CSRC, ROOT, SUPPORTED, rewrite, translate

pytestmark = [
    pytest.mark.timeout(COMPILE_SECONDS),
    pytest.mark.skipif(not SUPPORTED, reason="needs Linux on x86-64"),
]


def compare(name: str, skipped: str = "", *edits: str) -> list[str]:
    """What ``tests.emulate.compare`` finds; a crash is a finding too."""
    command = [sys.executable, "-m", "tests.emulate.compare", name, skipped, *edits]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        return [f"signal {-done.returncode}"]
    assert done.returncode == 0, done.stderr
    differences: list[str] = json.loads(done.stdout.splitlines()[-1])
    return differences


def test_a_dropped_barrier_is_found() -> None:
    first = barriers(CSRC / "vote_masks" / "vote_masks_cuda.cu")[0]
    assert any(compare("vote_masks", first)) and not any(compare("vote_masks"))


MISTAKES = {
    "index": ("(roi * s.size + sy.low) * s.size", "(roi * s.size + sy.low + 1) * s.size"),
    "product": (
        "rounded_sum(a, rounded_product(fraction, rounded_sum(b, -a)))",
        "a + fraction * (b - a)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_index_and_an_unprotected_product_are_found(mistake: str) -> None:
    before, after = MISTAKES[mistake]
    folder = CSRC / "vote_masks"
    assert any(before in path.read_text() for path in folder.iterdir())
    assert any(compare("vote_masks", "", before, after))


def test_a_launch_in_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="a launch or shared memory in a form that is not known"):
        rewrite("kernels[0]<<<1, 2>>>(x);", CSRC)


def test_lines_of_a_translated_source_keep_their_numbers() -> None:
    path = CSRC / "vote_masks" / "vote_masks_cuda.cu"
    text = path.read_text()
    translated = translate(text, path)
    line = text[: text.index('#include "')].count("\n") + 1
    assert f'#line {line} "{path.name}"' in translated
    assert translated.count("cuda_on_cpu::launch(") == len(re.findall("<<<", text))
