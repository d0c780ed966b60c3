"""The paper's rule for windows, for the tests of InstanceFCN."""

from dataclasses import replace
from typing import Any

from instseg.projects.instance_fcn import WindowRule


def window_rule(**changes: Any) -> WindowRule:
    """Windows of 21 cells of 8 pixels, with some values changed."""
    rule = WindowRule(
        size=21,
        stride=8,
        canonical_size=128.0,
        positive_offset=16.0,
        positive_octaves=0.3,
        negative_offset=32.0,
        negative_octaves=1.0,
    )
    return replace(rule, **changes)
