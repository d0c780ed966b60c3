"""Memory does not grow with the length of a video or the number of images."""

import re
from pathlib import Path

import pytest

from tests.support.forking import run_forked
from tests.support.yolact_tiny import TINY

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads memory from /proc"
)


def growth(skipped: int, *arguments: str) -> float:
    """Megabytes by which the tool's own process grows after so many frames or images."""
    small = [*TINY, "TEST.DETECTIONS_PER_IMAGE", 5]
    done = run_forked("tools/predict_memory.py", *arguments, "--", *map(str, small))
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^ *(\d+) done +([\d.]+) MB$", done.stdout, re.MULTILINE)
    memory = {int(number): float(megabytes) for number, megabytes in lines}
    first, last = min(number for number in memory if number >= skipped), max(memory)
    assert last >= 2 * first
    return memory[last] - memory[first]


def test_memory_is_flat_over_the_frames_of_a_video() -> None:
    """80 decoded frames alone, 0.23 MB each, would be 18 MB if they were kept."""
    assert growth(40, "--frames", "120") < 6


def test_memory_is_flat_over_the_images_of_a_folder() -> None:
    """300 images and their masks, 16 kB, would be 4 MB and more if they were kept."""
    assert growth(100, "--frames", "400", "--images") < 2
