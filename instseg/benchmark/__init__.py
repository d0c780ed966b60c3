"""``instseg benchmark``: speed and memory as ratios against a named peer, measured in one run."""

from instseg.benchmark.models import benchmark_models
from instseg.benchmark.ops import benchmark_ops
from instseg.benchmark.rows import Row, report
from instseg.benchmark.tiles import benchmark_tiles
from instseg.benchmark.training import benchmark_train

__all__ = [
    "Row",
    "benchmark_models",
    "benchmark_ops",
    "benchmark_tiles",
    "benchmark_train",
    "report",
]
