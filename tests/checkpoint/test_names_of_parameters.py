"""Checkpoints written before load: no name, shape or dtype of a system's tensors has changed.

``tests/golden/parameters.json`` holds, for the ``shapes`` configuration of every system, the
SHA-256 of its sorted lines "name shape dtype".  A change of these makes the weights that users have
unusable.  A failure names the file of the lines; to see what changed, compare them with those that
the last commit that passed writes.
"""

import hashlib
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.meta_models import meta_model

DIGESTS: dict[str, str] = json.loads(
    (ROOT / "tests/golden/parameters.json").read_text(encoding="utf-8")
)


def lines_of(config: str) -> str:
    """Names, shapes and dtypes in the state dict of an untrained model."""
    state = meta_model(config).state_dict()
    return "".join(
        f"{name} {list(value.shape)} {value.dtype}\n" for name, value in sorted(state.items())
    )


@pytest.mark.parametrize("config", DIGESTS)
def test_the_tensors_of_a_system_are_called_as_before(config: str, tmp_path: Path) -> None:
    lines = lines_of(config)
    path = tmp_path / "lines.txt"
    path.write_text(lines, encoding="utf-8")
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == DIGESTS[config], f"names, shapes or dtypes changed; they are now as in {path}"
