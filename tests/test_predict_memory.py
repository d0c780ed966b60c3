"""Memory does not grow with the length of a video or the number of pictures."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, load_module

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads memory from /proc"
)


def test_memory_is_flat_over_the_frames_of_a_video(tmp_path: Path) -> None:
    tool = load_module(ROOT / "tools" / "predict_memory.py")
    memory = dict(tool.measure("yolact/yolact_shapes.yaml", tool.SMALL, 120, 20, tmp_path))
    first, last = min(n for n in memory if n >= 40), max(memory)
    assert last - first >= 50
    # Decoded frames alone, 0.23 MB each, would be 12 MB and more if they were kept.
    assert memory[last] - memory[first] < 6


def test_memory_is_flat_over_the_pictures_of_a_folder(tmp_path: Path) -> None:
    tool = load_module(ROOT / "tools" / "predict_memory.py")
    config = "yolact/yolact_shapes.yaml"
    memory = dict(tool.measure(config, tool.SMALL, 400, 50, tmp_path, pictures=True))
    first, last = min(n for n in memory if n >= 100), max(memory)
    assert last - first >= 200
    # Pictures and masks alone, 16 kB each, would be 4 MB and more if they were kept.
    assert memory[last] - memory[first] < 2
